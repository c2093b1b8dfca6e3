"""Losses by name: a function of (outputs, labels) that returns the sum over the samples it got."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.imports import load

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_function(train) -> Loss:
    """The loss of a recipe's `train` section. A user's function returns one loss a sample, shape (B,); another shape
    is refused with RequestError, for a mean over a batch would be divided twice."""
    if ":" in train.loss:
        own = load(train.loss, "train.loss")
        if isinstance(own, nn.Module) and any(p.requires_grad for p in own.parameters()):
            raise RequestError(
                f"train.loss = {train.loss}: has parameters, which no step trains; put them in the model"
            )

        def summed(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            losses = own(outputs, labels)
            if losses.shape != (len(labels),):
                raise RequestError(
                    f"train.loss = {train.loss}: returned shape {tuple(losses.shape)} for {len(labels)} samples; it "
                    'must return one loss a sample, shape (B,): reduction="none" in torch\'s losses'
                )
            return losses.sum()

        summed.own = own  # for those who ask what it remembers
        return summed
    smoothing = train.label_smoothing
    return lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
