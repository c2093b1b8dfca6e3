"""Fixed point on GPUs, a kernel each way: what torch does in seven passes over a bucket, in one, to the same bits.

    add    totals += round(gradients * scale), flags what is out of range, clears the gradients   12 B an element
    take   gradients = totals * unit                                                              12 B an element

Bytes are those of a step's only pass; `buckets` has the same in torch's own operations, for CPUs and float64, where
they move 52. Multiplying by a power of two is exact, int64 to float32 rounds to the nearest even, and so does `add`: no
product and sum is fused to something else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MADE_BY = "Triton"
BLOCK = 2048  # elements of a program
WHOLE = tl.constexpr(2.0**23)  # from here on every float32 is a whole number


@triton.jit
def _add(
    gradients, totals, flag, size, statistics, scale, statistics_scale, largest,
    FIRST: tl.constexpr, CLEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    value = tl.load(gradients + places, mask=inside, other=0.0)
    scaled = value * tl.where(places < statistics, statistics_scale, scale)
    # a float of 2^23 and more has no fraction: adding and taking away 2^23 rounds, halves to even
    shift = tl.where(scaled < 0, -WHOLE, WHOLE)
    rounded = tl.where(tl.abs(scaled) < WHOLE, (scaled + shift) - shift, scaled)
    fits = (rounded >= -largest) & (rounded <= largest)  # NaN does not
    tl.store(flag + places * 0, 1, mask=inside & (fits == 0))
    whole = rounded.to(tl.int64)
    if not FIRST:
        whole += tl.load(totals + places, mask=inside, other=0)
    tl.store(totals + places, whole, mask=inside)
    if CLEAR:
        tl.store(gradients + places, 0.0, mask=inside)


@triton.jit
def _take(totals, gradients, size, statistics, unit, statistics_unit, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.load(totals + places, mask=inside, other=0).to(tl.float32)
    tl.store(gradients + places, total * tl.where(places < statistics, statistics_unit, unit), mask=inside)


def add(
    gradients: torch.Tensor,
    totals: torch.Tensor,
    flag: torch.Tensor,
    statistics: int,
    scale: float,
    statistics_scale: float,
    largest: float,
    first: bool,
    clear: bool,
) -> None:
    """Add `gradients` (size,) float32 in units of 1/scale (the first `statistics` of them: 1/statistics_scale, both
    powers of two) to `totals` (size,) int64, or put them there (first). flag, a bool scalar, becomes true where one is
    beyond `largest` units or NaN. clear: gradients are zero afterwards."""
    size = gradients.numel()
    numbers = (size, statistics, scale, statistics_scale, largest)
    _add[(triton.cdiv(size, BLOCK),)](gradients, totals, flag.view(torch.uint8), *numbers, first, clear, BLOCK)


def take(totals: torch.Tensor, gradients: torch.Tensor, statistics: int, unit: float, statistics_unit: float) -> None:
    """The way back: `gradients` become `totals` times their unit."""
    size = gradients.numel()
    _take[(triton.cdiv(size, BLOCK),)](totals, gradients, size, statistics, unit, statistics_unit, BLOCK)
