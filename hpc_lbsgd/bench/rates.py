"""`bench rates`: what a recipe's step does with batches that are there already, what the loader does alone, and what
both do together. Under mpirun or srun every process is a rank; a step is as slow as its slowest rank.

The three take turns over the same steps of the schedule, so that what else the machine does meets all alike. The
synthetic batches are the first steps' own pictures, again and again.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.loader import Batch
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import together
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.theory.schedule import Schedule
from hpc_lbsgd.train.job import choose_device, configure_torch
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.step import Passes, Stepper

RATES = ("synthetic", "loader", "end-to-end")
KEPT_STEPS = 2  # whose batches are the synthetic ones


class Bench:
    """One recipe on one rank of a job, ready to be timed."""

    def __init__(self, recipe: Recipe, engine, device):
        manifest = manifests.Manifest(manifests.find(recipe.data.train))
        loaders.check_sizes(recipe.data, manifest, True)
        self.recipe, self.engine = recipe, engine
        self.schedule: Schedule = recipe.build_schedule(len(manifest))
        self.passes = Passes(recipe, engine.rank, engine.size)
        self.replica = Replica(recipe, len(manifest.classes), engine, device)
        self.replica.synchronise()
        machine = recipe.machine
        threads = machine.loader_threads or min(8, worlds.cores_per_rank(engine.local_size))
        largest = recipe.batch.samples_per_worker * machine.workers_per_pass
        self.loader = loaders.create(
            recipe.data,
            manifest,
            recipe.seed,
            True,
            largest,
            threads,
            machine.prefetch,
            self.replica.channels_last,
            device,
        )

    def real(self, first: int, last: int) -> Iterator[Batch]:
        return self.loader.batches(self.passes.requests(self.schedule, self.recipe.seed, first, last))

    def keep(self) -> None:
        """Take the synthetic batches from the first steps."""
        self.kept = [Batch(b[0].clone(), b[1].clone()) for b in self.real(0, KEPT_STEPS)]

    def train(self, batches: Iterator[Batch], first: int, last: int) -> None:
        stepper = Stepper(self.replica, self.recipe, batches)
        for number in range(first, last):
            stepper.run(self.schedule.at(number), self.schedule.at(max(0, number - 1)).lr)

    def time(self, what: str, first: int, last: int) -> float:
        """Images a second of all ranks over these steps."""
        images = sum(self.schedule.at(n).count for n in range(first, last))
        self.engine.barrier()
        before = time.perf_counter()
        if what == "synthetic":
            self.train(itertools.cycle(self.kept), first, last)
        elif what == "loader":
            for _ in self.real(first, last):
                pass
        else:
            batches = self.real(first, last)
            self.train(batches, first, last)
            next(batches, None)  # drains the loader
        self.engine.barrier()
        return images / (time.perf_counter() - before)


def rates(recipe: Recipe, rounds: int, steps: int) -> dict | None:
    """Medians and spread of the three rates over `rounds` of `steps` steps; on rank 0, None elsewhere. Collective."""
    world = worlds.from_environment()
    device = choose_device(world)
    configure_torch(recipe, world, device)
    engine = engines.create(recipe.machine, recipe.determinism, device)
    recipe = recipe.with_workers(engine.size)
    try:
        bench = together(engine, lambda: Bench(recipe, engine, device))
        steps = min(steps, bench.schedule.steps_in_epoch(0) - 1)  # full steps only
        if steps < 1:
            raise RequestError("an epoch of this recipe has no full step; use a smaller batch.workers")
        bench.keep()
        for what in RATES:
            bench.time(what, 0, steps)  # warm-up
        values: dict[str, list[float]] = {what: [] for what in RATES}
        with tqdm(total=rounds * len(RATES), unit="run", disable=None if engine.rank == 0 else True) as bar:
            for number in range(rounds):
                for what in RATES if number % 2 == 0 else RATES[::-1]:
                    values[what].append(bench.time(what, 0, steps))
                    bar.update(1)
        if engine.rank:
            return None
        return summary(recipe, engine, device, steps, values)
    finally:
        sys.stdout.flush()
        engine.close()


def summary(recipe: Recipe, engine, device, steps: int, values: dict[str, list[float]]) -> dict:
    pairs = zip(values["end-to-end"], values["synthetic"], strict=True)
    return {
        "data": str(Path(recipe.data.train)),
        "engine": engine.name,
        "ranks": engine.size,
        "device": str(device),
        "global_batch": recipe.batch.workers * recipe.batch.samples_per_worker,
        "steps_a_round": steps,
        "rates": {
            what: {"images_per_s": statistics.median(v), "lowest": min(v), "highest": max(v), "values": v}
            for what, v in values.items()
        },
        "end_to_end_over_synthetic": statistics.median(a / b for a, b in pairs),
    }


def show(result: dict) -> str:
    """The table, in Markdown."""
    rounds = len(result["rates"]["synthetic"]["values"])
    lines = [f"| {result['data']} | images/s, median of {rounds} | lowest - highest |", "|---|---:|---:|"]
    for what, r in result["rates"].items():
        lines.append(f"| {what} | {r['images_per_s']:.0f} | {r['lowest']:.0f} - {r['highest']:.0f} |")
    ratio = result["end_to_end_over_synthetic"]
    return "\n".join([*lines, "", f"end-to-end / synthetic: {ratio:.3f} ({result['ranks']} ranks, {result['device']})"])
