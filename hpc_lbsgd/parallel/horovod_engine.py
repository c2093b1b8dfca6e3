"""Horovod over MPI (NCCL where the ranks are GPUs): the only file that knows Horovod."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn

from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.abort import end_all_ranks
from hpc_lbsgd.parallel.openmpi import spare_one_sided


def environment(machine, determinism: str) -> dict[str, str]:
    """Variables that Horovod and MPI read when they start, from a recipe's machine part.

    What the recipe or determinism demands is here; MPI_DEFAULTS may be overruled by the user's environment.
    """
    settings = {"HOROVOD_FUSION_THRESHOLD": "0"}
    if machine.reduction == "fusion":
        settings["HOROVOD_FUSION_THRESHOLD"] = str(int(machine.fusion_threshold_mb * 2**20))
    if machine.cycle_time_ms is not None:
        settings["HOROVOD_CYCLE_TIME"] = str(machine.cycle_time_ms)
    if machine.yield_when_idle is not None:
        settings["OMPI_MCA_mpi_yield_when_idle"] = str(int(machine.yield_when_idle))
    if machine.allreduce:
        settings[f"HOROVOD_{machine.allreduce.upper()}_ALLREDUCE"] = "1"
    if determinism == "same-ranks":
        # one summation order, whatever the placement of ranks on nodes: no hierarchical algorithms, no tuning
        # (any-ranks sums integers: their order does not matter)
        settings |= {
            "HOROVOD_AUTOTUNE": "0",
            "HOROVOD_HIERARCHICAL_ALLREDUCE": "0",
            "HOROVOD_TORUS_ALLREDUCE": "0",
            "OMPI_MCA_coll_han_priority": "0",
            "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
            "OMPI_MCA_coll_tuned_allreduce_algorithm": "4",  # ring
            "OMPI_MCA_coll_tuned_dynamic_rules_filename": "",  # a site's choices: some versions prefer them to the ring
            "NCCL_ALGO": "Ring",
        }
    return settings


def defaults(on_gpu: bool) -> dict[str, str]:
    """Variables set where the user's environment does not."""
    if on_gpu:
        # a bucket is ready every few ms, and waits half a cycle on average before ranks agree to sum it; rank 0's
        # thread that leads the cycles sleeps in between
        return {"HOROVOD_CYCLE_TIME": "0.25"}
    # Ranks that compute on CPUs: a rank that waits must leave its core to those that compute, and 1 ms between
    # Horovod's cycles is long beside a small step.
    return {"OMPI_MCA_mpi_yield_when_idle": "1", "HOROVOD_CYCLE_TIME": "0.1"}


POLL_S = 5e-5  # Linux makes about 1e-4 of it


class HorovodEngine:
    name = "horovod"
    cores: int
    sums_gradients, named_sums = False, True

    def __init__(self, machine, determinism: str, device: torch.device):
        os.environ.update(environment(machine, determinism))
        for key, value in defaults(device.type == "cuda").items():
            os.environ.setdefault(key, value)
        self._polls = device.type == "cuda"
        spare_one_sided()
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        world = worlds.from_environment()
        if world.size not in (1, self.size):  # each rank would train alone
            raise RequestError(
                f"machine.engine = horovod: the launcher started {world.size} ranks, and MPI knows of {self.size}: "
                "start them with mpirun or srun of Horovod's own MPI, or set machine.engine = torch"
            )
        if device.type == "cuda" and not hvd.nccl_built():
            raise RunError(
                "Horovod was built without NCCL, and the ranks are GPUs: rebuild it where nvcc is "
                "(python tools/build_horovod.py --gpu nccl), or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
            )

    def wrap(self, model: nn.Module, bucket_mb: float) -> nn.Module:
        return model

    def start_sum(self, tensor: torch.Tensor, name: str) -> Any:
        return self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum)

    def wait(self, handle: Any) -> None:
        # Horovod's own wait spins (mpi_ops_v2.cc, WaitAndClear) and takes Python's lock each time round, which the
        # threads that decode and those that feed the GPU's loader want for themselves
        while self._polls and not self._hvd.poll(handle):
            time.sleep(POLL_S)
        self._hvd.synchronize(handle)

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        self._hvd.broadcast_(tensor, 0, name=name)

    def share(self, value: Any) -> Any:
        return self._hvd.broadcast_object(value, 0, name="share")

    def gather(self, value: Any) -> list:
        return self._hvd.allgather_object(value, name="gather")

    def barrier(self) -> None:
        self._hvd.barrier()

    def abort(self, code: int) -> None:
        end_all_ranks(code)

    def close(self) -> None:
        self._hvd.shutdown()
