"""torch.distributed's DistributedDataParallel itself, on Gloo (CPU ranks) or NCCL: the peer we measure against, and a
choice for users. Started by the same mpirun or srun; the only file that knows torch.distributed.

DDP sums gradients in its own buckets during backward and hands them back in place, so that the optimizer, BatchNorm's
statistics, the control vector and checkpoints are the same code as elsewhere.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import torch
from torch import nn

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.abort import end_all_ranks


def defaults(world: worlds.World) -> dict[str, str]:
    """Variables set where the user's environment does not."""
    settings = {"OMPI_MCA_mpi_yield_when_idle": "1"}  # MPI only says where to meet; it must not spin afterwards
    if world.local_size == world.size:
        settings["GLOO_SOCKET_IFNAME"] = "lo"  # one node: the host's name may lead anywhere
    return settings


def meeting_point(world: worlds.World):
    """The key-value store through which ranks find each other: rank 0 listens, MPI tells the others where."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size != world.size or comm.rank != world.rank:
        raise RunError(
            f"the launcher's environment says rank {world.rank} of {world.size}, MPI says {comm.rank} of {comm.size}: "
            "start the job with one launcher only"
        )
    import torch.distributed as dist

    host = "127.0.0.1" if world.local_size == world.size else socket.gethostname()
    store = port = None
    if comm.rank == 0:
        store = dist.TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False)
        port = store.port
    host, port = comm.bcast((host, port))
    return store or dist.TCPStore(host, port, world.size, is_master=False)


class DdpEngine:
    name = "ddp"
    sums_gradients = True

    def __init__(self, machine, determinism: str, device: torch.device):
        world = worlds.from_environment()
        for key, value in defaults(world).items():
            os.environ.setdefault(key, value)
        import torch.distributed as dist

        self._dist = dist
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=meeting_point(world),
            rank=world.rank,
            world_size=world.size,
        )
        self.rank, self.size, self.local_rank, self.local_size = world

    def wrap(self, model: nn.Module, bucket_mb: float) -> nn.Module:
        # running statistics are equal on all ranks already: there are no buffers to broadcast
        return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket_mb, broadcast_buffers=False)

    def start_sum(self, tensor: torch.Tensor, name: str) -> Any:
        """Sums have no names here: ranks must begin them in one order."""
        return self._dist.all_reduce(tensor, async_op=True)

    def wait(self, handle: Any) -> None:
        handle.wait()

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        self._dist.broadcast(tensor, 0)

    def share(self, value: Any) -> Any:
        box = [value]
        self._dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list:
        found = [None] * self.size
        self._dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        self.share(None)
        self.gather(None)

    def abort(self, code: int) -> None:
        end_all_ranks(code)

    def close(self) -> None:
        # Gloo's threads let go of a sum's tensors some time after it ended, and for that they need the interpreter. A
        # thread that asks while Python shuts down aborts the process (pytorch issue 190489), and neither destroying the
        # group nor a barrier waits for it: asleep, this thread leaves the interpreter to them.
        time.sleep(0.5)
        self._dist.destroy_process_group()
