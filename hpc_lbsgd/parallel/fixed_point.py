"""Whether fixed point has kernels of its own on this rank. Bits are the same with and without."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch


def kernels_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`kernels`, which do it in one pass over memory; None where torch's operations do. On a GPU that lacks them there
    is a warning."""
    if device.type != "cuda" or dtype != torch.float32:
        return None
    try:
        from hpc_lbsgd.parallel import kernels

        refuse_wrong(kernels, device)
        return kernels
    except Exception as problem:  # no Triton, or no C compiler, by which it makes a part of each; it fails in any way
        told = str(problem).strip().splitlines()
        warnings.warn(
            f"Triton makes no kernels here ({type(problem).__name__}: {told[0][:200] if told else ''}): fixed point "
            "takes torch's operations, to the same bits in more passes over memory. A C compiler on the nodes mends it",
            stacklevel=2,
        )
        return None


def refuse_wrong(kernels: ModuleType, device: torch.device) -> None:
    """Raise ArithmeticError where they do not count to two."""
    x, totals = torch.full((3,), 0.75, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    kernels.add(x, totals, torch.zeros((), dtype=torch.bool, device=device), 0, 2.0, 2.0, 8.0, True, False)
    if totals.tolist() != [2] * 3:
        raise ArithmeticError(f"3/4 in halves is {totals.tolist()}")
