"""The ranks of `bench scaling`: the trainer's own step of a recipe on this many ranks, weak and strong.

Started as `mpirun ... python -m hpc_lbsgd.bench.scaling.measure TASK OUT`, or called on the ranks that srun has
started. TASK is JSON: recipe (its batch.workers is k of strong scaling), modes, rounds, steps, warm_ups.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from statistics import fmean, median

import torch

from hpc_lbsgd import progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.core.timing import RATES, Bench, Timed, measured
from hpc_lbsgd.bench.core.turns import there_and_back
from hpc_lbsgd.parallel.agree import together
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import write_atomically
from hpc_lbsgd.train.job import meet


def measure(task: dict) -> dict | None:
    """What rank 0 knows when all rounds are over; None on the others. Collective."""
    recipe = recipes.validate(task["recipe"])
    device, engine = meet(recipe)
    whats = RATES if recipe.data.train or recipe.data.dataset else RATES[:1]
    total = len(task["modes"]) * task["rounds"] * len(whats)
    modes = {}
    # the parent of an mpirun shows its own progress
    with progress.bar(total=total, show=engine.rank == 0, unit="run") as bar:
        for mode in task["modes"]:
            modes[mode] = time_mode(with_workers(recipe, mode, engine.size), engine, device, whats, task, bar)
    hosts = engine.gather(socket.gethostname())
    facts = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    engine.barrier()
    engine.close()
    if engine.rank:
        return None
    return {"ranks": engine.size, "hosts": hosts, "engine": engine.name, "modes": modes, **facts}


def with_workers(recipe: Recipe, mode: str, ranks: int) -> Recipe:
    """Weak: a full pass on every rank. Strong: the recipe's k, always."""
    workers = recipe.machine.workers_per_pass * ranks if mode == "weak" else recipe.batch.workers
    batch = recipe.batch.model_copy(update={"workers": workers})
    return measured(recipe.model_copy(update={"batch": batch}))


def time_mode(recipe: Recipe, engine, device, whats: tuple[str, ...], task: dict, bar) -> dict:
    """The global batch, and a record of each rate a round."""
    bench = together(engine, lambda: Bench(recipe, engine, device))
    bench.replica.synchronise()
    rounds = []
    for number in range(task["rounds"]):
        found = {}
        for what in there_and_back(whats, number):
            timed = bench.time(what, task["steps"], task["warm_ups"])
            found[what] = of_all_ranks(timed, engine.gather(timed.steps))
            bar.update(1)
        rounds.append(found)
    passes = len(bench.passes.at(bench.schedule.at(0)))
    return {"global_batch": bench.schedule.at(0).global_batch, "passes_per_step": passes, "rounds": rounds}


def of_all_ranks(timed: Timed, ranks: list[list]) -> dict:
    """Pure. step_s: each step on its slowest rank. own_s: a rank's median step without the wait for others' sums."""
    found = {"images_per_s": timed.images_per_s}
    if not timed.steps:
        return found
    shares = {
        part: fmean(sum(getattr(s, part) for s in steps) / sum(s.seconds for s in steps) for steps in ranks)
        for part in ("data_wait_s", "exposed_comm_s")
    }
    return found | {
        "step_s": [max(s.seconds for s in same) for same in zip(*ranks, strict=True)],
        "own_s": [median(s.seconds - s.exposed_comm_s for s in steps) for steps in ranks],
        "data_wait_share": shares["data_wait_s"],
        "exposed_comm_share": shares["exposed_comm_s"],
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    result = measure(json.loads(sys.argv[1]))
    if result:
        write_atomically(Path(sys.argv[2]), json.dumps(result))
