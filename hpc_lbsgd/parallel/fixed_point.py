"""Sums over workers in fixed point: whole numbers of a unit, whose sum has no order (`determinism: any-ranks`).

int64, in one unit for all; or gradients in int32, each tensor in a unit of its own (scales.py). A value is rounded
once, by its worker; what has been rounded is only added.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from types import ModuleType

import torch

from hpc_lbsgd.parallel.layout import Layout
from hpc_lbsgd.parallel.scales import Scales

STATISTICS_BITS = 30  # BatchNorm's statistics are summed in units of 2**-bits of at least so many bits

Digest = Callable[[int, torch.Tensor], None]  # of a bucket's number and whole numbers


class FixedPoint:
    """The totals of all buckets: first this rank's workers', then all ranks'.

    flats    a bucket's floating-point values each, turned into whole numbers and back
    bits     int64 is in units of 2**-bits; BatchNorm's statistics in units of at most 2**-STATISTICS_BITS
    narrow   buckets that may (`Layout.narrow`) travel in int32, where steps before have shown in which units
    """

    def __init__(self, flats: Sequence[torch.Tensor], layouts: Sequence[Layout], bits: int, narrow: bool):
        device, dtype = flats[0].device, flats[0].dtype
        self.flats, self.layouts, self.bits = flats, layouts, bits
        # statistics hold counts in units of 2^-ceil(log2 groups), which a coarse unit would make zero
        self.finer = 2.0 ** max(0, STATISTICS_BITS - bits)
        self.totals = [torch.zeros(len(flat), dtype=torch.int64, device=device) for flat in flats]
        self.kernels = kernels_for(device, dtype)
        self.scales = Scales(flats, layouts, bits) if narrow else None

    def begin(self, workers: int, flushed: torch.Tensor | None) -> None:
        """A step of `workers` over all ranks. flushed: where to count gradients that are not zero, and those of them
        that rounding makes zero."""
        self.flushed, self._first_pass = flushed, True
        # so that not even `workers` values of the largest size allowed could wrap
        self._largest = 2.0**62 / workers
        self.out_of_range = torch.zeros((), dtype=torch.bool, device=self.flats[0].device)
        if self.scales:
            self.scales.begin(self._largest)

    def sums(self, index: int) -> torch.Tensor:
        """A bucket's totals, as they travel."""
        return self._int32(index)[0] if self._is_narrow(index) else self.totals[index]

    def _is_narrow(self, index: int) -> bool:
        return self.scales is not None and self.scales.narrow and self.layouts[index].narrow

    def _int32(self, index: int) -> tuple[torch.Tensor, ...]:
        """Totals of int32 in the memory of those of int64, and room for a worker's values beside them."""
        return self.totals[index].view(torch.int32).split(len(self.flats[index]))

    def _kernels(self, narrow: bool) -> ModuleType | None:
        """Those that do a bucket: on GPUs there are none of int32."""
        return self.kernels if not narrow or hasattr(self.kernels, "add_int32") else None

    def add(self, index: int, keep: bool, digest: Digest | None, apart: bool) -> None:
        """Add a worker's values to the totals, and clear them for the next unless `keep`. What is not finite, and what
        could wrap int64, is flagged. apart: only the digest is wanted."""
        flat, statistics = self.flats[index], self.layouts[index].statistics
        narrow, counted = self._is_narrow(index), self.flushed is not None and not apart
        seen = counted or apart or digest is not None  # the whole numbers of this worker alone are wanted
        # what int32 cannot hold becomes other bits in C, and ranks may be with and without it
        kernels = None if narrow and seen else self._kernels(narrow)
        if kernels and narrow:
            tables = (self.scales.ends[index], self.scales.factors(index))
            largest = kernels.add_int32(flat, self.sums(index), *tables, first=self._first_pass, clear=not keep)
            self.out_of_range |= self.scales.take_in(index, largest, add=True)
            return
        if self.scales:
            self.out_of_range |= self.scales.measure(index, add=not apart)
        total, clear = self.sums(index), apart or not keep
        if counted:
            before = torch.count_nonzero(flat[statistics:])
        if kernels:
            whole, first = (torch.empty_like(total), True) if seen else (total, self._first_pass)
            units = (statistics, 2.0**self.bits, 2.0**self.bits * self.finer, self._largest)
            kernels.add(flat, whole, self.out_of_range, *units, first=first, clear=clear)
        else:
            self._round(index)
            whole = flat
        if counted:
            self.flushed += torch.stack([before, before - torch.count_nonzero(whole[statistics:])])
        if digest is not None:
            digest(index, whole.to(total.dtype))
        if not apart and whole is not total:
            if self._first_pass:
                total.copy_(whole)
            else:
                total += self._int32(index)[1].copy_(whole) if narrow else whole.to(torch.int64)
        if clear and not kernels:
            flat.zero_()

    def _round(self, index: int) -> None:
        """A bucket's values to whole numbers of their units, in place."""
        flat = self.flats[index]
        if self._is_narrow(index):
            self.scales.to_units(index)
            flat.round_()
            return
        self._scale_statistics(index, self.finer)
        low, high = flat.mul_(2.0**self.bits).round_().aminmax()
        self.out_of_range |= ~((low >= -self._largest) & (high <= self._largest))

    def end_pass(self) -> None:
        """All buckets of a worker are in the totals."""
        self._first_pass = False

    def clear(self, index: int) -> None:
        """The totals of a rank without workers."""
        self.totals[index].zero_()

    def take(self, index: int) -> None:
        """The sums as floating-point values: one rounding, to the nearest."""
        flat, unit, statistics = self.flats[index], 2.0**-self.bits, self.layouts[index].statistics
        narrow = self._is_narrow(index)
        kernels = self._kernels(narrow)
        if kernels and narrow:
            kernels.take_int32(self.sums(index), flat, self.scales.ends[index], self.scales.factors(index))
        elif kernels:
            kernels.take(self.totals[index], flat, statistics, unit, unit / self.finer)
        elif narrow:
            flat.copy_(self.sums(index))
            self.scales.from_units(index)
        else:
            flat.copy_(self.totals[index]).mul_(unit)
            self._scale_statistics(index, 1 / self.finer)

    def _scale_statistics(self, index: int, factor: float) -> None:
        statistics = self.layouts[index].statistics
        if factor != 1 and statistics:
            self.flats[index][:statistics].mul_(factor)


# ---------------------------------------------------------------- kernels


def kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """What does int64 in one pass over memory; None where torch's operations do. On a GPU that lacks it there is a
    warning; of CPUs `doctor` says it. Bits are the same with and without."""
    if device.type not in ("cpu", "cuda") or dtype != torch.float32:
        return None
    try:
        return made_for(device)
    except Exception as problem:  # no Triton, or no C compiler, by which it makes a part of each; it fails in any way
        if device.type == "cpu" and isinstance(problem, OSError):  # it was not compiled
            return None
        told = str(problem).strip().splitlines()
        mends = "Installing the package again" if device.type == "cpu" else "A C compiler on the nodes"
        warnings.warn(
            f"no kernels here ({type(problem).__name__}: {told[0][:200] if told else ''}): fixed point "
            f"takes torch's operations, to the same bits in more passes over memory. {mends} mends it",
            stacklevel=2,
        )
        return None


def made_for(device: torch.device) -> ModuleType:
    """The kernels. Raises whatever there is where there are none, or wrong ones."""
    if device.type == "cpu":
        from hpc_lbsgd.parallel import cpu_kernels as kernels
    else:
        from hpc_lbsgd.parallel import kernels
    refuse_wrong(kernels, device)
    return kernels


def refuse_wrong(kernels: ModuleType, device: torch.device) -> None:
    """Raise ArithmeticError where they do not count to three, there and back, or do not see a NaN."""
    kinds = [torch.int64, torch.int32] if hasattr(kernels, "add_int32") else [torch.int64]
    for kind, last in product(kinds, (0.75, math.nan)):
        x = torch.tensor([0.75, 0.75, 0.75, last], dtype=torch.float32, device=device)
        totals = torch.zeros(4, dtype=kind, device=device)
        if kind == torch.int64:
            flag = torch.zeros((), dtype=torch.bool, device=device)
            kernels.add(x, totals, flag, 2, 2.0, 4.0, 8.0, True, False)
            kernels.take(totals, x, 2, 0.5, 0.25)
        else:
            tables = (torch.tensor([2, 4], device=device), torch.tensor([4, 2], dtype=torch.float64, device=device))
            flag = ~torch.isfinite(kernels.add_int32(x, totals, *tables, True, False)[1])
            kernels.take_int32(totals, x, *tables)
        found = (totals.tolist()[:3], x.tolist()[:3], bool(flag))
        if found != ([3, 3, 2], [0.75, 0.75, 1.0], math.isnan(last)):
            raise ArithmeticError(f"3/4 in quarters and halves, and {last}: {found[0]}, {found[1]}, flag {found[2]}")
