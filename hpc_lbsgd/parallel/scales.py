"""A unit for each parameter tensor, from its last sum: what int32 needs to hold sums over workers.

How units follow from S, and why nothing wraps unseen: theory/units.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hpc_lbsgd.parallel.layout import Layout
from hpc_lbsgd.theory import units


class Scales:
    """Exponents by parameter, and what a step measures for the next one's.

    bits         a tensor whose gradients were all zero so far is in units of 2**-bits, as all are in int64
    exponents    by name; empty before the first step that was taken, which is summed in int64
    again        int32 could not hold this step: it is computed once more, and summed in int64
    narrow       the step under way is summed in int32
    """

    def __init__(self, flats: Sequence[torch.Tensor], layouts: Sequence[Layout], bits: int):
        self.bits, self.again, self.narrow = bits, False, False
        self.exponents: dict[str, int] = {}
        self.names: list[str] = []
        self._tensors: list[list[torch.Tensor]] = []
        self._slots: list[slice] = []  # of a bucket's tensors among all
        self.ends: list[torch.Tensor] = []  # where in the bucket each tensor's part ends, and the next one's begins
        for flat, layout in zip(flats, layouts, strict=True):
            views = [view for view in layout.views if view.parameter.numel()]
            self._tensors.append([flat[v.offset : v.offset + v.parameter.numel()] for v in views])
            self._slots.append(slice(len(self.names), len(self.names) + len(views)))
            ends = [*(view.offset for view in views[1:]), len(flat)][: len(views)]
            self.ends.append(torch.tensor(ends, dtype=torch.int64, device="cpu"))
            self.names += [view.name for view in views]
        self.bounds = torch.zeros(len(self.names), dtype=torch.int64, device=flats[0].device)  # S of this rank's part

    def begin(self, largest: float) -> None:
        """A step. largest: in units, what one worker adds to S at most."""
        self.narrow, self._largest = bool(self.exponents) and not self.again, largest
        self._now = [self.exponents[name] if self.narrow else self.bits for name in self.names]
        self._factors = torch.tensor([2.0**e for e in self._now], dtype=torch.float64, device=self.bounds.device)
        self.bounds.zero_()

    def measure(self, index: int, add: bool) -> torch.Tensor:
        """Before a worker's values of a bucket are rounded: add their largest to S. Returns a bool scalar: one is not
        finite."""
        if not self._tensors[index]:  # statistics
            return self.bounds.new_zeros((), dtype=torch.bool)
        return self.take_in(index, largest_of(self._tensors[index]), add)

    def take_in(self, index: int, largest: torch.Tensor, add: bool) -> torch.Tensor:
        """`measure`, where the largest are known."""
        slots, largest = self._slots[index], largest.double()
        if add:
            self.bounds[slots] += (largest * self.factors(index)).ceil_().clamp_(max=self._largest).long()
        return ~torch.isfinite(largest).all()

    def factors(self, index: int) -> torch.Tensor:
        """2^exponent of a bucket's tensors, float64."""
        return self._factors[self._slots[index]]

    def to_units(self, index: int) -> None:
        torch._foreach_mul_(self._tensors[index], [2.0**e for e in self._now[self._slots[index]]])

    def from_units(self, index: int) -> None:
        torch._foreach_mul_(self._tensors[index], [2.0**-e for e in self._now[self._slots[index]]])

    # ---------------------------------------------------------------- S over ranks

    @property
    def length(self) -> int:
        """Of S in a control vector."""
        return 2 * len(self.names)

    def write(self, tail: torch.Tensor) -> None:
        """As 32-bit halves, which a float64 sum keeps."""
        tail.view(2, -1).copy_(halves(self.bounds))

    def read(self, sums: Sequence[float]) -> list[int]:
        """S by tensor."""
        half = len(self.names)
        return [(int(high) << 32) + int(low) for high, low in zip(sums[:half], sums[half:], strict=True)]

    def overflow(self, bounds: Sequence[int]) -> list[str]:
        """Tensors whose sums may have wrapped, or leave float32."""
        found = zip(self.names, bounds, self._now, strict=True)
        return [name for name, bound, now in found if self.narrow and not units.fits(bound, now)]

    def settle(self, bounds: Sequence[int] | None, again: bool, share: float = 1.0) -> None:
        """After a step. bounds: S of one that was taken. again: it is to be computed once more. share: B'/kn of a tail,
        whose S is about so much of a whole step's, and the next step is one."""
        self.again = again
        if bounds is not None:
            before, found = self.exponents, zip(self.names, bounds, self._now, strict=True)
            # without a gradient it stays what it was, which is not what an int64 step is in
            self.exponents = {
                name: units.next_exponent(math.ceil(bound / share), now) if bound else before.get(name, now)
                for name, bound, now in found
            }


def halves(value: torch.Tensor) -> torch.Tensor:
    """int64 as two float64 that are whole numbers below 2^32, stacked."""
    return torch.stack([value >> 32 & 0xFFFFFFFF, value & 0xFFFFFFFF]).double()


def largest_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """max |x| of each, a vector; NaN where one is in it."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors, float("inf")))
    low, high = (torch.stack(found) for found in zip(*(t.aminmax() for t in tensors), strict=True))
    return torch.maximum(-low, high)
