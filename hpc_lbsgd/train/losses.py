"""Losses by name: a function of (outputs, labels) that returns the sum over the samples it got."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hpc_lbsgd.data.fields import CLASS, NOWHERE
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.targets import Targets, rows, tensors
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.imports import load

Loss = Callable[[torch.Tensor, Targets], torch.Tensor]


def loss_function(train) -> Loss:
    """The loss of a recipe's `train` section. A user's function returns one loss a sample, shape (B,); another shape
    is refused with RequestError, for a mean over a batch would be divided twice."""
    if ":" in train.loss:
        own = load(train.loss, "train.loss")
        if isinstance(own, nn.Module) and any(p.requires_grad for p in own.parameters()):
            raise RequestError(
                f"train.loss = {train.loss}: has parameters, which no step trains; put them in the model"
            )

        def summed(outputs: torch.Tensor, labels: Targets) -> torch.Tensor:
            losses = own(outputs, labels)
            if losses.shape != (rows(labels),):
                raise RequestError(
                    f"train.loss = {train.loss}: returned shape {tuple(losses.shape)} for {rows(labels)} samples; it "
                    'must return one loss a sample, shape (B,): reduction="none" in torch\'s losses'
                )
            return losses.sum()

        summed.own = own  # for those who ask what it remembers
        return summed
    if train.loss in OF_NUMBERS:
        return of_numbers(train.loss)
    smoothing = train.label_smoothing
    if train.loss == OF_PIXELS:
        return lambda outputs, labels: of_pixels(outputs, labels, smoothing)
    return lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)


OF_PIXELS = "pixel-cross-entropy"


def of_pixels(outputs: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy of outputs (B, classes, H, W) and masks (B, H, W): a sample's is the mean over its pixels that
    count."""
    if outputs.shape[:1] + outputs.shape[2:] != labels.shape:
        raise RequestError(
            f"train.loss = {OF_PIXELS}: outputs are {tuple(outputs.shape)}, and masks {tuple(labels.shape)}; the "
            "model is to give a number a class for each pixel, (B, classes, H, W)"
        )
    rows = outputs.movedim(1, -1).flatten(0, -2)  # a pixel each: torch has no deterministic kernel for images of them
    losses = F.cross_entropy(rows, labels.flatten(), reduction="none", ignore_index=NOWHERE, label_smoothing=smoothing)
    counted = (labels != NOWHERE).flatten(1).sum(dim=1).clamp(min=1)
    return (losses.view(len(labels), -1).sum(dim=1) / counted).sum()


OF_NUMBERS: dict[str, Callable] = {
    "mse": F.mse_loss,
    "binary-cross-entropy": F.binary_cross_entropy_with_logits,
}


def of_numbers(name: str) -> Loss:
    """A loss between a sample's outputs and all its targets side by side, in their order: the mean over them."""

    def summed(outputs: torch.Tensor, labels: Targets) -> torch.Tensor:
        wanted = torch.cat([t.reshape(len(t), -1).to(outputs.dtype) for t in tensors(labels)], dim=1)
        found = outputs[:, None] if outputs.dim() == 1 else outputs
        if found.shape != wanted.shape:
            raise RequestError(
                f"train.loss = {name}: outputs are {tuple(outputs.shape)}, and the targets {tuple(wanted.shape)}; the "
                f"model is to give {wanted.shape[1]} numbers a sample"
            )
        return OF_NUMBERS[name](found, wanted, reduction="none").mean(dim=1).sum()

    return summed


def check(loss: str, targets: Sequence[str], manifest: Manifest, outputs: int) -> None:
    """Raise RequestError where a loss of ours cannot be taken of these targets of a set. outputs: of the model."""
    if ":" in loss:
        return
    kinds = [manifest.fields[name].kind for name in targets]
    asked = f"data.targets = [{', '.join(targets)}] with train.loss = {loss}"
    if loss in OF_NUMBERS and not set(kinds) <= {"int", "float"}:
        raise RequestError(f"{asked}: it is of numbers; for a class cross-entropy, for a mask {OF_PIXELS}, or your own")
    wanted = {"cross-entropy": CLASS, OF_PIXELS: "mask"}.get(loss)
    if wanted and kinds != [wanted]:
        raise RequestError(
            f"{asked}: it is of one {wanted} a sample; for a mask {OF_PIXELS}, for numbers {' or '.join(OF_NUMBERS)}, "
            "for others a loss of your own"
        )
    if loss == OF_PIXELS and manifest.fields[targets[0]].width > outputs:
        largest = manifest.fields[targets[0]].width - 1
        raise RequestError(f"data.classes = {outputs}: {targets[0]} of {manifest.path} has classes up to {largest}")
    for name in targets if loss == "binary-cross-entropy" else ():
        for some in manifest.looked_at():
            values = manifest.values(name)[some]
            if values.min() < 0 or values.max() > 1:
                row = int(((values < 0) | (values > 1)).reshape(len(values), -1).any(axis=1).argmax())
                raise RequestError(
                    f"{asked}: {manifest.file(some.start + row)} has {name} = {values[row]}, not from 0 to 1"
                )
