"""What a rank trains with - loaders and its replica - and the preflight that stands between them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data.order import Permutation, worker_samples
from hpc_lbsgd.data.source import Batch, Loader
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.targets import each_tensor
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.agree import agree, together
from hpc_lbsgd.theory.schedule import Point, Schedule
from hpc_lbsgd.train import crosscheck, models, preflight
from hpc_lbsgd.train.preflight import Check
from hpc_lbsgd.train.replica import DTYPES, Replica, memory_format_of


@dataclass
class Parts:
    """The replica is at its starting weights, and not yet synchronised."""

    replica: Replica
    train_loader: Loader
    eval_loader: Loader | None
    checks: list[Check]
    facts: dict | None  # what this start computed (preflight.COMPARED), to be compared at a resume
    preflight_s: float

    def refuse(self) -> None:
        """Raise RequestError where a check failed."""
        failed = [c for c in self.checks if not c.ok]
        if failed:
            raise RequestError(
                "preflight: "
                + "; ".join(f"{c.check}: {c.what}" for c in failed)
                + ". Nothing was started (train.preflight = false starts all the same)"
            )


def build(recipe, schedule: Schedule, train_set, eval_set, engine, device: torch.device, begun: dict | None) -> Parts:
    """Everything between a request and the first step, checked; collective. begun: facts of the run's first start."""
    classes = recipe.data.classes

    def author() -> torch.nn.Module:
        return models.build(recipe.model, recipe.data.channels, classes, recipe.seed, DTYPES[recipe.precision])

    model = together(engine, author)
    memory_format = together(engine, lambda: memory_format_of(recipe, model, device))
    train_loader, eval_loader = together(
        engine, lambda: make_loaders(recipe, train_set, eval_set, memory_format, engine, device)
    )
    started = time.perf_counter()
    full = recipe.train.preflight
    batches, again = first_batches(recipe, schedule, train_loader)
    found = agree(engine, lambda: preflight.before(recipe, classes, batches, device, memory_format, full))
    seconds = time.perf_counter() - started
    replica = together(engine, lambda: Replica(recipe, classes, engine, device, found.calls, model))
    if not full or not all(c.ok for c in found.checks):
        return Parts(replica, train_loader, eval_loader, found.checks if full else [], None, seconds)
    started = time.perf_counter()
    checks, facts = preflight.after(replica, recipe, schedule.at(0), batches, begun, found.weights)
    data = preflight.check_data(batches[0], again, engine)
    seconds += time.perf_counter() - started
    return Parts(replica, train_loader, eval_loader, [data, *found.checks, *checks], facts, seconds)


def make_loaders(recipe, train_set, eval_set, memory_format, engine, device) -> tuple[Loader, Loader | None]:
    machine = recipe.machine
    threads = machine.loader_threads or min(8, engine.cores)
    shared = (
        threads,
        machine.prefetch,
        memory_format == torch.channels_last,
        device,
        machine.prefetch_mb,
        machine.loader_processes,
    )
    largest = recipe.batch.samples_per_worker * machine.workers_per_pass
    train = loaders.create(recipe.data, train_set, recipe.seed, True, largest, *shared)
    evaluation = eval_set and loaders.create(recipe.data, eval_set, recipe.seed, False, machine.eval_batch, *shared)
    return train, evaluation or None


def first_batches(recipe, schedule: Schedule, loader: Loader) -> tuple[dict[int, Batch], Batch]:
    """What workers 0 and 1 get at the first step, or 0 alone, decoded on this rank; and 0's once more."""
    point, permutation = schedule.at(0), Permutation(schedule.samples, recipe.seed, 0)
    samples = {j: worker_samples(permutation, point, j) for j in (0, 1)}
    samples = {j: found for j, found in samples.items() if len(found)}
    made = loader.batches(Request(0, found) for found in (*samples.values(), samples[0]))
    # a loader's memory is used again
    *batches, again = [
        Batch(*(each_tensor(torch.clone, part) for part in (b.inputs, b.labels)), b.replaced) for b in made
    ]
    return dict(zip(samples, batches, strict=True)), again


def recompute(recipe, schedule: Schedule, train_set, replica: Replica, point: Point, worker: int) -> int:
    """A digest of what a worker adds to a step, decoded and computed once more, apart from the step's own loader."""
    memory_format = torch.channels_last if replica.channels_last else torch.contiguous_format
    loader, _ = make_loaders(recipe, train_set, None, memory_format, replica.engine, replica.device)
    samples = worker_samples(Permutation(schedule.samples, recipe.seed, point.epoch), point, worker)
    (batch,) = loader.batches([Request(point.epoch, samples)])
    return crosscheck.number(crosscheck.digest(preflight.Bench(replica, recipe, point).share({worker: batch})))
