"""The ranks of `bench allreduce`: time one way of summing, over a list of sizes.

Started as `mpirun ... python -m hpc_lbsgd.bench.allreduce.measure TASK OUT`; TASK is JSON: via (engine, mpi or
reference), engine or algorithm, bytes, seconds (to spend on each size), node_size.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

WARM_UPS = 2
FEWEST, MOST = 5, 200  # repeats of a size


class MpiCarrier:
    """MPI's own allreduce, or a reference algorithm, on a numpy buffer."""

    def __init__(self, task: dict):
        from mpi4py import MPI

        from hpc_lbsgd.bench.allreduce import collectives

        self.comm, self._mpi, self._collectives = MPI.COMM_WORLD, MPI, collectives
        self.rank, self.size, self.task = self.comm.rank, self.comm.size, task
        self.library = MPI.Get_library_version().split("\n")[0].split(",")[0]

    def summing(self, size_bytes: int) -> Callable[[], None]:
        data = np.zeros(size_bytes // 4, np.float32)
        if self.task["via"] == "mpi":
            return lambda: self.comm.Allreduce(self._mpi.IN_PLACE, data)
        steps = self._collectives.program(
            self.task["algorithm"], self.rank, self.size, len(data), 4, self.task["node_size"]
        )
        return lambda: self._collectives.allreduce(self.comm, data, steps)

    def barrier(self) -> None:
        self.comm.Barrier()

    def largest(self, value: float) -> float:
        return self.comm.allreduce(value, op=self._mpi.MAX)

    def close(self) -> None:
        pass


class EngineCarrier:
    """An engine of ours on a torch tensor: what a bucket of gradients goes through."""

    def __init__(self, task: dict):
        import torch

        from hpc_lbsgd import recipe
        from hpc_lbsgd.parallel import engine, world
        from hpc_lbsgd.train.job import choose_device

        self._torch, self.device = torch, choose_device(world.from_environment())
        self.engine = engine.create(recipe.Machine(engine=task["engine"]), "off", self.device)
        self.rank, self.size = self.engine.rank, self.engine.size
        self.library = f"torch {torch.__version__}, {self.device}"

    def summing(self, size_bytes: int) -> Callable[[], None]:
        data = self._torch.zeros(size_bytes // 4, device=self.device)

        def once():
            self.engine.wait(self.engine.start_sum(data, "bench"))
            if self.device.type == "cuda":
                self._torch.cuda.synchronize()

        return once

    def barrier(self) -> None:
        self.engine.barrier()

    def largest(self, value: float) -> float:
        return max(self.engine.gather(value))

    def close(self) -> None:
        self.engine.close()


def time_one(carrier, size_bytes: int, seconds: float) -> tuple[float, int]:
    """(median seconds of an allreduce on its slowest rank, repeats)."""
    once = carrier.summing(size_bytes)
    for _ in range(WARM_UPS):
        once()
    carrier.barrier()
    before = time.perf_counter()
    once()
    first = carrier.largest(time.perf_counter() - before)  # so that all ranks choose the same number of repeats
    repeats = int(min(MOST, max(FEWEST, seconds / first)))
    found = []
    carrier.barrier()
    for _ in range(repeats):
        before = time.perf_counter()
        once()
        found.append(time.perf_counter() - before)
    return carrier.largest(statistics.median(found)), repeats


def adding_s_per_byte(size_bytes: int = 2**22) -> float:
    """Gamma: one rank adds one buffer to another while the others do the same."""
    a, b = np.zeros(size_bytes // 4, np.float32), np.ones(size_bytes // 4, np.float32)
    found = []
    for _ in range(9):
        before = time.perf_counter()
        a += b
        found.append(time.perf_counter() - before)
    return statistics.median(found) / size_bytes


def main(task: dict, out: Path) -> None:
    carrier = EngineCarrier(task) if task["via"] == "engine" else MpiCarrier(task)
    rows = []
    for size_bytes in task["bytes"]:
        seconds, repeats = time_one(carrier, size_bytes, task["seconds"])
        rows.append({"bytes": size_bytes, "seconds": seconds, "repeats": repeats})
    carrier.barrier()
    gamma = adding_s_per_byte()
    if carrier.rank == 0:
        out.write_text(json.dumps({"rows": rows, "gamma_s_per_byte": gamma, "library": carrier.library}))
    carrier.barrier()
    carrier.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
