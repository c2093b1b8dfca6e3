"""A schedule from keywords or a recipe: epoch, learning rate and global batch of every step."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal, SupportsIndex

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory import schedule as theory


def whole(key: str, value: SupportsIndex, least: int = 1) -> int:
    try:
        found = operator.index(value)
    except TypeError:
        raise RequestError(f"lb.Schedule({key}={value!r}): a whole number") from None
    if found < least:
        raise RequestError(f"lb.Schedule({key}={value}): at least {least}")
    return found


def number(key: str, value: float) -> float:
    """As Python's own float, which optimizers keep and files may hold."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise RequestError(f"lb.Schedule({key}={value!r}): a number") from None
    if not 0 <= found < math.inf:
        raise RequestError(f"lb.Schedule({key}={value}): from 0 on, and finite")
    return found


class Schedule(theory.Schedule):
    """`at(step)` is pure: a step's `epoch`, `lr`, `workers`, `global_batch`, `count`. `steps` is how many there are.

    samples, epochs       N, and how often each is seen
    workers               k virtual workers a step, over all ranks; any number of ranks computes them
    samples_per_worker    n; the global batch is kn
    lr                    after warm-up, for the global batch kn (Goyal et al. 2017: 0.1 kn / 256)
    momentum              what `at(step).momentum` says; an optimizer has its own
    milestones, factor    epochs at which lr is divided by `factor`
    shape                 'constant' between milestones, or 'cosine' to zero, without milestones
    warmup_epochs         gradual warm-up over so many epochs (0: none), from `warmup_start_lr` (default: lr / workers)
    last_batch            'partial': an epoch ends with a step of fewer samples, their sum over kn; 'drop': without it
    max_steps             a cap, which changes nothing before it
    measure_every         steps between measurements of the noise scale (0: never)

    Raises RequestError for what makes no schedule.
    """

    def __init__(
        self,
        *,
        samples: int,
        workers: int,
        samples_per_worker: int,
        epochs: int,
        lr: float,
        momentum: float = 0.9,
        milestones: Sequence[int] = (),
        factor: float = 10.0,
        shape: Literal["constant", "cosine"] = "constant",
        warmup_epochs: float = 0.0,
        warmup_start_lr: float | None = None,
        last_batch: Literal["partial", "drop"] = "partial",
        max_steps: int | None = None,
        measure_every: int = 0,
    ):
        samples, workers = whole("samples", samples), whole("workers", workers)
        samples_per_worker, epochs = whole("samples_per_worker", samples_per_worker), whole("epochs", epochs)
        max_steps = None if max_steps is None else whole("max_steps", max_steps)
        measure_every = whole("measure_every", measure_every, least=0)
        lr, momentum = number("lr", lr), number("momentum", momentum)
        factor, warmup_epochs = number("factor", factor), number("warmup_epochs", warmup_epochs)
        if not factor:
            raise RequestError("lb.Schedule(factor=0): above 0")
        if shape not in ("constant", "cosine") or last_batch not in ("partial", "drop"):
            raise RequestError(
                f"lb.Schedule(shape={shape!r}, last_batch={last_batch!r}): constant or cosine; partial or drop"
            )
        if milestones and shape == "cosine":
            raise RequestError("lb.Schedule(milestones=..., shape='cosine'): one or the other")
        marks = [whole("milestones", mark) for mark in milestones]
        if marks != sorted(set(marks)) or (marks and not 0 < marks[0] <= marks[-1] < epochs):
            raise RequestError(f"lb.Schedule(milestones={marks}): epochs that rise, above 0 and below {epochs}")
        if not 0 <= warmup_epochs < epochs:
            raise RequestError(f"lb.Schedule(warmup_epochs={warmup_epochs}): from 0 to below {epochs} epochs")
        kn = workers * samples_per_worker
        if last_batch == "drop" and kn > samples:
            raise RequestError(
                f"lb.Schedule: a global batch of {kn} is more than {samples} samples, and drop leaves none"
            )
        if measure_every and (workers == 1 or kn > samples):
            raise RequestError(
                f"lb.Schedule(measure_every={measure_every}): the noise scale is told from the gradients of several "
                f"workers in a full step, and {'workers=1' if workers == 1 else f'a full step has {kn} samples'}"
            )
        stages = theory.step_decay(workers, lr, momentum, marks, factor)
        if shape == "cosine":
            stages = [theory.Stage(0, workers, lr, momentum, "cosine")]
        start = lr / workers if warmup_start_lr is None else number("warmup_start_lr", warmup_start_lr)
        warmup = theory.Warmup(warmup_epochs, start)
        super().__init__(samples, samples_per_worker, stages, epochs, last_batch, warmup, max_steps, measure_every)

    @staticmethod
    def of_recipe(name: str, samples: int, workers: int | None = None) -> theory.Schedule:
        """The schedule of a recipe (a file, or the name of one that is shipped) on N samples.

        workers: k, where the recipe says `per_rank`; a number of yours, for a resume on other ranks keeps it.
        """
        recipe = recipes.read(name)
        if recipe.schedule.kind == "adaptive-batch":
            raise RequestError(
                f"lb.Schedule.of_recipe({name!r}): schedule.kind = adaptive-batch is decided by the trainer while it "
                "runs; a script has the other kinds"
            )
        if recipe.batch.workers != "per_rank" and workers not in (None, recipe.batch.workers):
            raise RequestError(
                f"lb.Schedule.of_recipe({name!r}, workers={workers}): the recipe has batch.workers = "
                f"{recipe.batch.workers}"
            )
        if recipe.batch.workers == "per_rank" and workers is None:
            raise RequestError(
                f"lb.Schedule.of_recipe({name!r}): its batch.workers = per_rank; say how many: workers=8"
            )
        return recipe.with_workers(whole("workers", workers or 1)).build_schedule(samples)
