"""Fixed point on CPUs in one pass over memory, as kernels.py does it on GPUs: the calls of cpu_kernels.c, which is
compiled with the package where there is a C compiler (setup.py). To the bits of torch's operations.

One thread, as `any-ranks` has it for a CPU rank.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from pathlib import Path

import torch

MADE_BY = "C"
POINTER, WHOLE, REAL, YES = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int


def load() -> ctypes.CDLL:
    """Raises OSError where it was not compiled, or for another kind of machine; another error where it is of another C
    file than the one that is here: that is new, and was not installed, or could not be compiled then."""
    found = importlib.util.find_spec("hpc_lbsgd.parallel._cpu_kernels")
    if found is None:
        raise OSError("its C part was not compiled when the package was installed")
    library = ctypes.CDLL(found.origin)
    digest = hashlib.blake2b(Path(__file__).with_suffix(".c").read_bytes(), digest_size=8).hexdigest()
    if ctypes.c_uint64.in_dll(library, "hpc_lbsgd_source").value != int(digest, 16):
        raise ImportError(f"{found.origin} was compiled of another cpu_kernels.c")
    for function, types in (
        (library.hpc_lbsgd_add, [POINTER, POINTER, POINTER, WHOLE, WHOLE, REAL, REAL, REAL, YES, YES]),
        (library.hpc_lbsgd_take, [POINTER, POINTER, WHOLE, WHOLE, REAL, REAL]),
        (library.hpc_lbsgd_add_int32, [POINTER, POINTER, WHOLE, POINTER, POINTER, POINTER, YES, YES]),
        (library.hpc_lbsgd_take_int32, [POINTER, POINTER, WHOLE, POINTER, POINTER]),
    ):
        function.argtypes, function.restype = types, None
    return library


LIBRARY = load()


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
    """As kernels.add."""
    numbers = (gradients.numel(), statistics, scale, statistics_scale, largest, first, clear)
    LIBRARY.hpc_lbsgd_add(gradients.data_ptr(), totals.data_ptr(), flag.data_ptr(), *numbers)


def take(totals: torch.Tensor, gradients: torch.Tensor, statistics: int, unit: float, statistics_unit: float) -> None:
    """As kernels.take."""
    numbers = (gradients.numel(), statistics, unit, statistics_unit)
    LIBRARY.hpc_lbsgd_take(totals.data_ptr(), gradients.data_ptr(), *numbers)


def add_int32(
    gradients: torch.Tensor,
    totals: torch.Tensor,
    ends: torch.Tensor,
    scales: torch.Tensor,
    first: bool,
    clear: bool,
) -> torch.Tensor:
    """Add `gradients` (size,) float32 to `totals` (size,) int32, or put them there (first): tensor t's part of them,
    which ends before ends[t] (tensors,) int64, in units of 1/scales[t] (tensors,) float64. clear: gradients are zero
    afterwards. Returns the largest |gradient| of each tensor, (tensors,) float32, not finite where one is not. Where it
    is more than int32 holds, totals are worth nothing."""
    largest = torch.empty(len(ends), dtype=torch.float32, device="cpu")  # whatever the default is
    tables = (ends.data_ptr(), scales.data_ptr(), largest.data_ptr())
    LIBRARY.hpc_lbsgd_add_int32(gradients.data_ptr(), totals.data_ptr(), len(ends), *tables, first, clear)
    return largest


def take_int32(totals: torch.Tensor, gradients: torch.Tensor, ends: torch.Tensor, scales: torch.Tensor) -> None:
    """The way back."""
    tables = (ends.data_ptr(), scales.data_ptr())
    LIBRARY.hpc_lbsgd_take_int32(totals.data_ptr(), gradients.data_ptr(), len(ends), *tables)
