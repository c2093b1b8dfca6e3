"""The ranks of `bench step`: train on synthetic pictures one way, time whole steps and their parts.

Started as `mpirun ... python -m hpc_lbsgd.bench.step.measure TASK OUT`; TASK is JSON: engine, mode, model, image_size,
precision, batches, warm_ups, steps, threads, and machine (a recipe's keys, where they are not the default).

Two measurements a batch size. Whole steps run as they would in training, nothing added: they give images/s. Parts are
timed in further steps, on GPUs with a synchronisation between parts, which costs time: they say where a step goes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from hpc_lbsgd.bench.core.task import PARTS, recipe_of
from hpc_lbsgd.bench.step.ways import ENGINES, Clock
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.train.job import choose_device, configure_torch

MOST_TIMES = 16  # as many steps as the largest batch


def steps_of(batch: int, task: dict) -> int:
    """The task's steps at its largest batch; smaller ones are shorter and get as many images."""
    return task["steps"] * min(MOST_TIMES, max(task["batches"]) // batch)


def time_batch(way, batch: int, task: dict, device: torch.device) -> dict:
    """Seconds of a step on the slowest rank, and the medians of its parts on this one."""
    steps = steps_of(batch, task)
    way.prepare(batch)
    for _ in range(task["warm_ups"]):
        way.step()
    way.barrier()
    clock = Clock(device)
    clock.start()
    for _ in range(steps):
        way.step()
    clock.wait()
    step_s = way.slowest((time.perf_counter() - clock.last) / steps)
    found = []
    for _ in range(max(3, steps // 4)):
        clock = Clock(device)
        way.step_in_parts(clock)
        found.append(clock.parts)
    way.barrier()
    return {"batch": batch, "step_s": step_s} | {p: statistics.median(f[p] for f in found) for p in PARTS}


def main(task: dict, out: Path) -> None:
    device = choose_device(worlds.from_environment())
    configure_torch(recipe_of(task, 1, 1))
    if device.type == "cpu":  # the same for all, one process alone included
        torch.set_num_threads(task["threads"])
    way = ENGINES[task["engine"]](task, device)
    rows = [time_batch(way, batch, task, device) for batch in task["batches"]]
    if way.rank == 0:
        facts = {"device": str(device), "threads": torch.get_num_threads(), "cores": worlds.cores()}
        facts["torch"] = torch.__version__
        facts["settings"] = {k: v for k, v in os.environ.items() if k.startswith(("HOROVOD_", "OMPI_MCA_mpi"))}
        out.write_text(json.dumps({"rows": rows, "ranks": way.size, **facts}))
    way.barrier()
    way.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
