"""How a model's parameters lie in a few flat buffers: which bucket has which, and where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

ALIGN_BYTES = 64  # of every view: vector loads and MPI's copies want it


@dataclass(frozen=True)
class View:
    """Where one parameter lies in its bucket (offsets and sizes in elements)."""

    name: str
    parameter: nn.Parameter
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's part of a flat buffer, in its own shape and memory format; without gaps, where it is a slice
        of something larger."""
        dense = torch.empty_like(self.parameter, device="meta", memory_format=torch.preserve_format)
        return flat.as_strided(self.parameter.shape, dense.stride(), self.offset)


@dataclass(frozen=True)
class Layout:
    """One bucket: BatchNorm statistics first (where it has them), then decayed, then other parameters."""

    statistics: int  # elements at the start that are no gradients
    views: tuple[View, ...]
    decay_end: int  # [statistics, decay_end) get weight decay, [decay_end, size) do not
    size: int
    narrow: bool  # may travel in fewer bits than others


def aligned(elements: int, itemsize: int) -> int:
    step = ALIGN_BYTES // itemsize
    return -(-elements // step) * step


def plan_layouts(
    parameters: Iterable[tuple[str, nn.Parameter]],
    no_decay: set[str],
    statistics: int,
    bucket_bytes: float,
    first_bucket_bytes: float,
    narrow: bool = False,
) -> list[Layout]:
    """Cut parameters, in the order backward meets them (last first), into buckets of about `bucket_bytes`.

    `statistics` elements ride at the start of the first bucket; with `narrow` they travel apart, for variances fit
    neither float16's range, nor bfloat16's digits, nor a unit that follows gradients. Then they come last, for they are
    there when backward ends, and on some engines what is full waits for the buckets before it.
    """
    groups: list[list[tuple[str, nn.Parameter]]] = [[]]
    used = 0
    for name, parameter in reversed(list(parameters)):
        size = parameter.numel() * parameter.element_size()
        limit = first_bucket_bytes if len(groups) == 1 else bucket_bytes
        if used and size and used + size > limit:  # an empty tensor has no bucket to itself, which would be empty
            groups.append([])
            used = 0
        groups[-1].append((name, parameter))
        used += size
    layouts: list[Layout] = []
    for group in groups:
        head = 0 if layouts or narrow else statistics
        offset, views = head, []
        for decayed in (True, False):
            for name, parameter in group:
                if (name not in no_decay) == decayed:
                    views.append(View(name, parameter, offset))
                    offset = aligned(offset + parameter.numel(), parameter.element_size())
            if decayed:
                decay_end = offset
        layouts.append(Layout(head, tuple(views), decay_end, offset, narrow))
    if narrow and statistics:
        layouts.append(Layout(statistics, (), statistics, statistics, False))
    return layouts
