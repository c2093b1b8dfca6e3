"""One rank's copy of everything a step changes: weights, running statistics, optimizer state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel.buckets import Buckets, aligned, plan_layouts
from hpc_lbsgd.parallel.engine import Engine
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import models, optim
from hpc_lbsgd.train.workers import GhostBatchNorm, PassContext, make_virtual

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.float32}  # of weights


class RunningStatistics:
    """BatchNorm's running means and variances as views into one flat buffer, laid out like the statistics that
    ride in the first bucket, so that adding a pass's statistics and a step's moving average are one operation each.
    """

    def __init__(self, layers: list[GhostBatchNorm], dtype: torch.dtype, device: torch.device):
        self.layers = layers
        offset = 0
        self.offsets = []
        for layer in layers:
            self.offsets.append(offset)
            offset = aligned(offset + 2 * layer.num_features, dtype.itemsize)
        self.size = offset
        self.flat = torch.zeros(offset, dtype=dtype, device=device)
        self.momentum = torch.zeros_like(self.flat)
        self.measured: list[torch.Tensor] = []  # of the pass under way: a flat buffer a BatchNorm group
        for layer, start in zip(layers, self.offsets, strict=True):
            view = self.flat[start : start + 2 * layer.num_features].view(2, -1)
            view[0], view[1] = layer.running_mean, layer.running_var
            layer.running_mean, layer.running_var = view[0], view[1]
            self.momentum[start : start + 2 * layer.num_features] = layer.momentum

    def begin_pass(self, groups: int) -> None:
        """Make room for what the layers measure in a pass of so many BatchNorm groups."""
        while len(self.measured) < groups:
            measured = torch.zeros_like(self.flat)
            self.measured.append(measured)
            for layer, start in zip(self.layers, self.offsets, strict=True):
                mean_var = measured[start : start + 2 * layer.num_features].view(2, -1)
                # .data: versions of their own. A compiled layer saves its buffers for backward, and writing those of
                # the next layer would count as a change of them.
                layer.measured.append((mean_var[0].data, mean_var[1].data))
        for measured in self.measured[:groups]:
            measured.zero_()  # else a NaN would stay: batch_norm adds to 0 times what is there

    def end_forward(self, statistics: torch.Tensor, groups: int, share: float) -> None:
        """Add each group's statistics, times `share`, to this flat buffer."""
        for measured in self.measured[:groups]:
            statistics.add_(measured, alpha=share)

    def update(self, means: torch.Tensor) -> None:
        """running <- (1 - momentum) * running + momentum * mean over all groups of the step."""
        self.flat.lerp_(means, self.momentum)
        for layer in self.layers:
            layer.num_batches_tracked += 1


class Replica:
    """The model as `recipe` says, its parameters laid into buckets, on this rank's device.

    channels_last: the memory format of the weights, and the one that images should have.
    """

    def __init__(self, recipe, classes: int, engine: Engine, device: torch.device):
        self.engine, self.device = engine, device
        dtype, machine = DTYPES[recipe.precision], recipe.machine
        model = models.build(recipe.model, recipe.data.channels, classes, recipe.seed, dtype)
        self.channels_last = machine.channels_last and (device.type != "cpu" or channels_last_is_safe(model))
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(device, memory_format=memory_format)
        self.context = PassContext(recipe.seed, recipe.batch.group)
        self.running = RunningStatistics(make_virtual(self.model, self.context), dtype, device)
        compress = recipe.wire == "fp16"
        limit = 0 if machine.reduction == "fusion" else machine.bucket_mb * 2**20
        layouts = plan_layouts(
            [(n, p) for n, p in self.model.named_parameters() if p.requires_grad],
            optim.no_decay_names(self.model),
            self.running.size,
            limit,
            min(limit, machine.first_bucket_mb * 2**20),
            compress,
        )
        self.buckets = Buckets(
            layouts,
            engine,
            device,
            dtype,
            bits=recipe.fixed_point_bits if recipe.determinism == "any-ranks" else None,
            wire_scale=2.0**recipe.wire_scale_bits if compress else None,
        )
        self.optimizer = optim.create(self.buckets, recipe.optim)
        decay = recipe.train.ema_decay
        self.average = optim.WeightAverage(self.buckets, decay) if decay else None
        if machine.compile == "stages":
            models.compile_stages(self.model)
        self.bucket_mb = machine.bucket_mb
        self.training_model = self.model  # what a pass calls

    def begin_pass(self, step: int, workers: list[int], counts: list[int], groups_in_step: int) -> None:
        """Before a forward: its workers and how many samples each has, and BatchNorm's groups in the whole step."""
        self.context.begin(step, workers, counts, groups_in_step)
        self.running.begin_pass(len(self.context.groups))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The model's outputs; what its BatchNorm layers measured goes to the first bucket."""
        outputs = self.training_model(images)
        self.running.end_forward(self.buckets.statistics, len(self.context.groups), self.context.group_share)
        return outputs

    def passing(self, sums: bool) -> AbstractContextManager:
        """Around a forward-backward. sums: it is the one in which the engine's model sums gradients over ranks."""
        if sums or not self.engine.sums_gradients:
            return nullcontext()
        return self.training_model.no_sync()

    def update(self, point: Point, previous_lr: float) -> None:
        """Take the step: the buckets hold the sums over all workers."""
        self.optimizer.step(point, previous_lr)
        self.running.update(self.buckets.statistics)
        if self.average:
            self.average.update()

    def decayed(self) -> Iterator[nn.Parameter]:
        """Parameters that have weight decay."""
        for bucket in self.buckets.buckets:
            yield from (v.parameter for v in bucket.layout.views if v.offset < bucket.layout.decay_end)

    def synchronise(self) -> None:
        """Rank 0's weights, statistics and optimizer state on every rank; then all must have one checksum.

        Collective, once, before the first step: the engine meets the model here.
        """
        self.training_model = self.engine.wrap(self.model, self.bucket_mb)
        self.buckets.broadcast_weights()
        self.engine.broadcast(self.running.flat, "running")
        for kind, kept in self.optimizer.flats.items():
            for i, flat in enumerate(kept):
                self.engine.broadcast(flat, f"optimizer.{kind}.{i}")
        for i, flat in enumerate(self.average.flats if self.average else ()):
            self.engine.broadcast(flat, f"average.{i}")
        flats = [self.running.flat, *(bucket.weights for bucket in self.buckets.buckets)]
        done = {flat.untyped_storage().data_ptr() for flat in flats}
        for name, tensor in self.model.state_dict().items():
            if tensor.untyped_storage().data_ptr() not in done:  # counters, frozen parameters, the user's buffers
                self.engine.broadcast(tensor, f"state.{name}")
        self.check_equal("start")

    def check_equal(self, when: str) -> str:
        """SHA-256 of the weights and running statistics; refuses to go on where ranks differ."""
        digest = weights_sha256(self.model)
        digests = self.engine.gather(digest)
        other = [rank for rank, d in enumerate(digests) if d != digests[0]]
        if other:
            raise RunError(
                f"weights differ between ranks at the {when}: ranks {other[:20]} are not equal to rank 0. A rank "
                "computed or received something else; do not trust results since the last checkpoint",
                everywhere=True,
            )
        return digest

    def gradient_bytes(self) -> int:
        return sum(b.layout.size * b.gradients.element_size() for b in self.buckets.buckets)


def channels_last_is_safe(model: nn.Module) -> bool:
    """False where oneDNN's backward of a strided 1x1 convolution writes past its buffer: with fewer channels than
    its block of 16, channels last (uxlfoundation/oneDNN#6035). The heap is corrupted without a message."""
    return not any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels // m.groups < 16
        for m in model.modules()
    )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the state dict by name: parameters and BatchNorm statistics, in their own types."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
