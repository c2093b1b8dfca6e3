"""The seam between the trainer and what carries its sums.

An engine sums tensors over ranks and moves small Python objects. Every method is collective (all ranks call it,
in one order) except `wait` and `abort`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.sections import Machine


class Engine(Protocol):
    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    cores: int  # of this rank alone, as measured by `create`: its threads are as many
    sums_gradients: bool  # the model that `wrap` returns sums its gradients over ranks in backward
    named_sums: bool  # sums are matched by name; else by their order, which must be one on all ranks

    def wrap(self, model: nn.Module, bucket_mb: float) -> nn.Module:
        """What training is to call in place of `model`; it shares all parameters."""

    def start_sum(self, tensor: torch.Tensor, name: str) -> Any:
        """Begin to replace `tensor` (contiguous) by its sum over ranks; returns a handle for `wait`.
        With `named_sums` those of one step may begin in any order, under names that differ."""

    def wait(self, handle: Any) -> None: ...

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        """Replace `tensor` by rank 0's."""

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""

    def barrier(self) -> None: ...

    def abort(self, code: int) -> None:
        """End every rank of the job, now. Any rank may call it, from any thread."""

    def close(self) -> None: ...


def create(machine: Machine, determinism: str, device: torch.device) -> Engine:
    """The engine that a recipe's `machine.engine` names. Collective: ranks meet here; Horovod starts MPI."""
    engine: Engine
    if machine.engine == "torch":
        from hpc_lbsgd.parallel.torch_engine import TorchEngine

        engine = TorchEngine(machine, determinism, device)
    elif machine.engine == "ddp":
        from hpc_lbsgd.parallel.ddp_engine import DdpEngine

        engine = DdpEngine(machine, determinism, device)
    elif machine.engine == "horovod":
        from hpc_lbsgd.parallel.horovod_engine import HorovodEngine

        engine = HorovodEngine(machine, determinism, device)
    else:
        raise AssertionError(f"no engine is called {machine.engine}")  # a word of the schema without one
    engine.cores = own_cores(engine)
    return engine


def own_cores(engine: Engine) -> int:
    """Cores that this rank has to itself; one at least. Collective."""
    return max(1, int(worlds.shares(engine.gather(worlds.place()))[engine.rank]))
