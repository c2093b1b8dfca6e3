"""Layers that see virtual workers: what the hardware does must not show in the result.

A pass may hold several workers. BatchNorm normalises groups of `bn_group` samples, each inside one worker;
dropout draws one mask a worker. Both learn from a shared `PassContext` who is in the pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpc_lbsgd.data.order import stream_key


@dataclass
class PassContext:
    """The pass under way: its workers, how many samples each has, and BatchNorm's groups."""

    seed: int
    bn_group: int
    step: int = 0
    workers: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)  # sizes of the BatchNorm groups, in the order of the samples
    group_share: float = 0.0  # 1 / BatchNorm groups of the whole step, over all ranks

    def begin(self, step: int, workers: list[int], counts: list[int], groups_in_step: int) -> None:
        self.step, self.workers, self.counts = step, workers, counts
        self.groups = [size for count in counts for size in group_sizes(count, self.bn_group)]
        self.group_share = 1.0 / groups_in_step
        # For models that draw outside nn.Dropout: exact with one worker a pass. Not torch.manual_seed, which formats
        # a stack trace where CUDA is idle: 0.16 ms a pass.
        key = stream_key("model", self.seed, step, workers[0])
        torch.default_generator.manual_seed(key)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(key)


def group_sizes(count: int, bn_group: int) -> list[int]:
    """`count` samples of one worker in groups of `bn_group`; a short tail worker ends with a smaller group."""
    full, rest = divmod(count, bn_group)
    return [bn_group] * full + ([rest] if rest else [])


def groups_in_step(point, bn_group: int) -> int:
    """BatchNorm groups of one step over all workers, from its schedule point alone."""
    full, rest = divmod(point.count, point.samples_per_worker)
    return full * len(group_sizes(point.samples_per_worker, bn_group)) + len(group_sizes(rest, bn_group))


class GhostBatchNorm(_BatchNorm):
    """BatchNorm over groups of `bn_group` samples (Goyal et al. 2017, section 2.3: n is part of the objective).

    While training, running statistics are not touched. Each group's mean and unbiased variance are left in
    `measured`; their sum over all ranks, times 1 / groups of the step, is their mean over all groups, from which
    every rank makes the same moving average (`replica.RunningStatistics`).
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.context is None:
            return super().forward(x)
        sizes = self.context.groups
        if len(sizes) == 1:
            return self._group(x, 0)
        return torch.cat([self._group(part, g) for g, part in enumerate(x.split(sizes))])

    def _group(self, x: torch.Tensor, group: int) -> torch.Tensor:
        mean, variance = self.measured[group] if self.measured else (None, None)
        if x.numel() == self.num_features:  # a single value has no variance: it normalises to zero
            if mean is not None:
                mean.copy_(x.detach().flatten())
            return x * 0 if self.bias is None else x * 0 + self.bias.view(1, -1, *[1] * (x.dim() - 2))
        # With momentum 1 the "running" buffers come back holding this group's mean and unbiased variance.
        return F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1.0, self.eps)

    @classmethod
    def of(cls, layer: _BatchNorm, context: PassContext) -> GhostBatchNorm:
        """The same layer (parameters and buffers shared) with groups."""
        if layer.momentum is None:
            raise ValueError("BatchNorm with momentum=None (cumulative average) has no meaning over a resumed run")
        ghost = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        ghost.weight, ghost.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(ghost, name, buffer)
        ghost.context = context
        ghost.measured = []  # (mean, unbiased variance) a group of the pass under way; none for a layer without any
        ghost.training = layer.training
        return ghost


# nn.Dropout2d drops whole channels: its mask has size 1 in the last 2 dimensions
DROPOUTS = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (seed, layer, step, worker)."""

    def __init__(self, layer: nn.Dropout, name: str, context: PassContext):
        super().__init__()
        self.p, self.name, self.context = layer.p, name, context
        self.shared_dims = DROPOUTS[type(layer)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        c = self.context
        masks = []
        for worker, count in zip(c.workers, c.counts, strict=True):
            generator = torch.Generator(x.device).manual_seed(stream_key("dropout", c.seed, self.name, c.step, worker))
            shape = (count, *x.shape[1:])
            if self.shared_dims:
                shape = (*shape[: len(shape) - self.shared_dims], *[1] * self.shared_dims)
            masks.append(torch.rand(shape, generator=generator, device=x.device) >= self.p)
        return x * torch.cat(masks) / (1 - self.p)


def make_virtual(model: nn.Module, context: PassContext) -> list[GhostBatchNorm]:
    """Replace BatchNorm and dropout layers of `model` in place; returns the BatchNorm layers with statistics."""
    ghosts = []
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, GhostBatchNorm):
                ghost = GhostBatchNorm.of(child, context)
                setattr(parent, name, ghost)
                if ghost.track_running_stats:
                    ghosts.append(ghost)
            elif type(child) in DROPOUTS:
                setattr(parent, name, KeyedDropout(child, f"{prefix}.{name}", context))
    return ghosts
