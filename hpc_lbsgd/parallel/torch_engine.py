"""torch.distributed's own collectives: NCCL where ranks are GPUs, Gloo on CPUs. No Horovod, and no MPI where torchrun
or srun starts the ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel import meeting
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.abort import end_all_ranks

# Others may wait for hours while rank 0 lists, checks or stages data; that they all live is the watchdog's to see.
LONGEST_WAIT = timedelta(hours=12)


def environment(determinism: str) -> dict[str, str]:
    """Variables that determinism demands."""
    return {"NCCL_ALGO": "Ring"} if determinism == "same-ranks" else {}


def defaults(world: worlds.World) -> dict[str, str]:
    """Variables set where the user's environment does not."""
    settings = {"OMPI_MCA_mpi_yield_when_idle": "1"}  # MPI only says where to meet; it must not spin afterwards
    if world.local_size == world.size:
        settings["GLOO_SOCKET_IFNAME"] = "lo"  # one node: the host's name may lead anywhere
    return settings


@contextmanager
def collective() -> Iterator[None]:
    """A collective, and what Gloo says where another process has closed its connection."""
    try:
        yield
    except RuntimeError as problem:
        raise RunError(f"a sum over ranks failed, as it does where one has ended: {problem}") from None


class TorchEngine:
    name = "torch"
    cores: int
    sums_gradients = named_sums = False

    def __init__(self, machine, determinism: str, device: torch.device):
        world = worlds.from_environment()
        os.environ.update(environment(determinism))
        for key, value in defaults(world).items():
            os.environ.setdefault(key, value)
        import torch.distributed as dist

        self._dist = dist
        store, self._mpi = meeting.meet(world)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=LONGEST_WAIT,
        )
        self.rank, self.size, self.local_rank, self.local_size, _ = world

    def wrap(self, model: nn.Module, bucket_mb: float) -> nn.Module:
        return model

    def start_sum(self, tensor: torch.Tensor, name: str) -> Any:
        return self._dist.all_reduce(tensor, async_op=True)

    def wait(self, handle: Any) -> None:
        with collective():
            handle.wait()

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        with collective():
            self._dist.broadcast(tensor, 0)

    def share(self, value: Any) -> Any:
        box = [value]
        with collective():
            self._dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list:
        found = [None] * self.size
        with collective():
            self._dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        self.share(None)
        self.gather(None)

    def exchange(self, mine: torch.Tensor, theirs: torch.Tensor, partner: int) -> None:
        """Send `mine` to a rank and fill `theirs` with what it sends. The two call it; nobody else need."""
        ops = [self._dist.P2POp(self._dist.isend, mine, partner), self._dist.P2POp(self._dist.irecv, theirs, partner)]
        for handle in self._dist.batch_isend_irecv(ops):
            self.wait(handle)

    def abort(self, code: int) -> None:
        end_all_ranks(code, self._mpi)

    def close(self) -> None:
        # Gloo's threads let go of a sum's tensors some time after it ended, and for that they need the interpreter. A
        # thread that asks while Python shuts down aborts the process (pytorch issue 190489), and neither destroying the
        # group nor a barrier waits for it: asleep, this thread leaves the interpreter to them.
        time.sleep(0.5)
        self._dist.destroy_process_group()
