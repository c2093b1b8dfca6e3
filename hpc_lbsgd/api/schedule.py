"""A schedule from keywords or a recipe: epoch, learning rate and global batch of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory import schedule as theory


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
        counts = {"samples": samples, "workers": workers, "samples_per_worker": samples_per_worker, "epochs": epochs}
        for key, value in counts.items():
            if value < 1:
                raise RequestError(f"lb.Schedule({key}={value}): at least 1")
        if shape not in ("constant", "cosine") or last_batch not in ("partial", "drop"):
            raise RequestError(
                f"lb.Schedule(shape={shape!r}, last_batch={last_batch!r}): constant or cosine; partial or drop"
            )
        if milestones and shape == "cosine":
            raise RequestError("lb.Schedule(milestones=..., shape='cosine'): one or the other")
        marks = list(milestones)
        if marks != sorted(set(marks)) or (marks and not 0 < marks[0] <= marks[-1] < epochs):
            raise RequestError(f"lb.Schedule(milestones={marks}): epochs that rise, above 0 and below {epochs}")
        if not 0 <= warmup_epochs < epochs:
            raise RequestError(f"lb.Schedule(warmup_epochs={warmup_epochs}): from 0 to below {epochs} epochs")
        kn = workers * samples_per_worker
        if last_batch == "drop" and kn > samples:
            raise RequestError(
                f"lb.Schedule: a global batch of {kn} is more than {samples} samples, and drop leaves none"
            )
        stages = theory.step_decay(workers, lr, momentum, marks, factor)
        if shape == "cosine":
            stages = [theory.Stage(0, workers, lr, momentum, "cosine")]
        start = lr / workers if warmup_start_lr is None else warmup_start_lr
        warmup = theory.Warmup(warmup_epochs, start)
        super().__init__(samples, samples_per_worker, stages, epochs, last_batch, warmup, max_steps, measure_every)

    @staticmethod
    def of_recipe(name: str, samples: int) -> theory.Schedule:
        """The schedule of a recipe (a file, or the name of one that is shipped) on N samples."""
        return recipes.read(name).build_schedule(samples)
