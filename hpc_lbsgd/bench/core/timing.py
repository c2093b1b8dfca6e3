"""What a recipe's step does with batches that are there already, what the loader does alone, and what both do together,
on the ranks of a job: a step is as slow as its slowest rank. The three are timed over the same steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.core.pictures import noise
from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.targets import each_tensor, rows
from hpc_lbsgd.data.user import PREFIX, UserSet
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.theory.schedule import Schedule
from hpc_lbsgd.train.compiling import settle
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.step import Passes, Stepper

RATES = ("synthetic", "loader", "end-to-end")
WARM_UPS = 5  # steps before the clock starts
CLASSES = 1000  # where neither recipe nor data say


class StepTime(NamedTuple):
    """Seconds of one step on one rank."""

    seconds: float
    data_wait_s: float
    exposed_comm_s: float


class Timed(NamedTuple):
    images_per_s: float  # of all ranks
    steps: list[StepTime]  # of this rank; none of the loader alone


def measured(recipe: Recipe) -> Recipe:
    """`recipe` with nothing that makes one step unlike the next: full batches of one size, no measuring of the noise
    scale, and a learning rate with which no picture makes the weights explode."""
    content = recipe.model_dump(mode="json")
    content["batch"]["last_batch"] = "drop"
    content["optim"]["base_lr"] = 1e-4
    content["schedule"] = {"kind": "constant", "scaling": "none", "warmup": "none"}
    content["train"] |= {"epochs": 10**6, "max_steps": None, "noise_scale_steps": 0}
    return recipes.validate(content)


def training_set(recipe: Recipe) -> Manifest | UserSet | None:
    """What the recipe trains on; None where it names nothing. Raises RequestError where it is not there."""
    data = recipe.data
    if data.dataset:
        return loaders.open_set(recipe, f"{PREFIX}train")
    if not data.train:
        return None
    try:
        manifest = Manifest(find(data.train))
    except RequestError as problem:
        raise RequestError(f"data.train = {data.train}: {problem}") from None
    loaders.check_sizes(data, manifest, True)
    return manifest


class Bench:
    """One recipe (`measured`, its k settled) on one rank of a job, ready to be timed.

    Synthetic batches stay in memory: the first step's own, or noise where there is no data set.
    """

    def __init__(self, recipe: Recipe, engine, device: torch.device):
        recipe = recipe.with_compile(engine.gather(settle(recipe, device).machine.compile)[0])  # as the trainer has it
        self.recipe, self.engine, self.device = recipe, engine, device
        found = training_set(recipe)
        samples = recipe.batch.kn if found is None else len(found)
        self.schedule: Schedule = recipe.build_schedule(samples)
        self.passes = Passes(recipe, engine.rank, engine.size)
        classes = recipe.data.classes or (found and len(found.classes)) or CLASSES
        self.replica = Replica(recipe, classes, engine, device)
        self.loader = None if found is None else self._loader(found)
        self.kept = self._noise(classes) if found is None else self._own()

    def _loader(self, found: Manifest | UserSet):
        data, machine, seed = self.recipe.data, self.recipe.machine, self.recipe.seed
        threads = machine.loader_threads or min(8, self.engine.cores)
        largest = self.recipe.batch.samples_per_worker * machine.workers_per_pass
        shared = (
            threads,
            machine.prefetch,
            self.replica.channels_last,
            self.device,
            machine.prefetch_mb,
            machine.loader_processes,
        )
        return loaders.create(data, found, seed, True, largest, *shared)

    def _own(self) -> dict[int, Batch]:
        """A batch of each size that the first step has."""
        kept: dict[int, Batch] = {}
        for inputs, labels, _ in self.real(1):
            if rows(labels) not in kept:
                kept[rows(labels)] = Batch(each_tensor(torch.clone, inputs), each_tensor(torch.clone, labels))
        return kept

    def _noise(self, classes: int) -> dict[int, Batch]:
        data, generator = self.recipe.data, torch.Generator().manual_seed(self.engine.rank)
        sizes = {sum(work.counts) for work in self.passes.at(self.schedule.at(0))}
        shape = (data.channels, data.image_size, classes, self.replica.channels_last, self.device)
        return {size: noise(generator, size, *shape) for size in sizes}

    def real(self, steps: int) -> Iterator[Batch]:
        return self.loader.batches(self.passes.requests(self.schedule, self.recipe.seed, 0, steps))

    def synthetic(self, steps: int) -> Iterator[Batch]:
        for number in range(steps):
            for work in self.passes.at(self.schedule.at(number)):
                yield self.kept[sum(work.counts)]

    def time(self, what: str, steps: int, warm_ups: int = WARM_UPS) -> Timed:
        """`steps` steps after `warm_ups`: one of RATES. Collective.

        The loader goes on to the end of the window and beyond, so that it is as far ahead there as at the start.
        """
        # one more: a GPU's next step has begun where one is known to be over
        asked = warm_ups + steps + 1 + (0 if what == "synthetic" else self.recipe.machine.prefetch + 1)
        batches = self.synthetic(asked) if what == "synthetic" else self.real(asked)
        if what == "loader":

            def advance(number: int) -> None:
                for _ in self.passes.at(self.schedule.at(number)):
                    next(batches)
        else:
            stepper = Stepper(self.replica, self.recipe, batches)
            outcomes = stepper.outcomes(map(self.schedule.at, range(warm_ups + steps + 1)))

            def advance(number: int) -> StepTime:
                before = time.perf_counter()
                outcome = next(outcomes)
                if not outcome.finite:
                    raise RunError(f"step {number}: loss or gradient is not finite; nothing can be measured")
                return StepTime(time.perf_counter() - before, outcome.data_wait_s, outcome.exposed_comm_s)

        for number in range(warm_ups):
            advance(number)
        self._meet()
        before = time.perf_counter()
        times = [advance(number) for number in range(warm_ups, warm_ups + steps)]
        self._meet()
        seconds = time.perf_counter() - before
        if what != "loader":
            stepper.drop()
        for _ in batches:  # to be drained before the loader is asked again
            pass
        return Timed(steps * self.schedule.at(0).count / seconds, [] if what == "loader" else times)

    def _meet(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.engine.barrier()
