"""The run as a function of the step: epoch, learning rate, momentum, batch and sample range.

The step is the only clock. `Schedule.at(step)` is pure and O(1), so a resume, a plan, a plot and the
trainer cannot disagree.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """From `first_epoch` on: `workers` workers, this learning rate (after warm-up) and momentum.

    `shape` says how the learning rate goes on from the end of warm-up (or from the stage's first epoch, if that is
    later) to the end of the run: 'constant', 'cosine' to zero, or 'polynomial', (1 - progress)^power; or a function of
    the epoch, in fractions since the start of the run, that returns the share of `lr`.
    """

    first_epoch: int
    workers: int
    lr: float
    momentum: float
    shape: str | Callable[[float], float] = "constant"
    power: float = 2.0


@dataclass(frozen=True)
class Warmup:
    """Warm-up over `epochs` epochs (0: none), from `start_lr` (Goyal et al. 2017, section 2.2).

    gradual   a constant increment each step, up to the first stage's learning rate
    constant  `start_lr` all the time, then the jump
    """

    epochs: float
    start_lr: float
    kind: str = "gradual"


@dataclass(frozen=True)
class Point:
    """One step. Its samples are perm[first : first + count] of its epoch's permutation. measured: the gradient's noise
    scale is measured at this step."""

    step: int
    epoch: int
    step_in_epoch: int
    lr: float
    momentum: float
    workers: int
    samples_per_worker: int
    first: int
    count: int
    measured: bool = False

    @property
    def global_batch(self) -> int:
        """kn, the size of a full global batch at this step (`count` is smaller on a partial tail)."""
        return self.workers * self.samples_per_worker

    @property
    def share(self) -> float:
        """B'/kn: 1, or less on a partial tail."""
        return self.count / self.global_batch

    def worker_range(self, worker: int) -> tuple[int, int]:
        """Positions [start, stop) in the epoch's permutation of worker j; empty for a worker past the tail."""
        start = min(worker * self.samples_per_worker, self.count)
        stop = min(start + self.samples_per_worker, self.count)
        return self.first + start, self.first + stop


class Schedule:
    """`at(step)` for every step of a run.

    samples             N, samples in the training set
    samples_per_worker  n
    stages              by first_epoch, the first at epoch 0
    epochs              passes over the data
    last_batch          'drop': floor(N/kn) steps an epoch. 'partial': ceil(N/kn), the tail with B' < kn samples: a
                        step in which the absent ones count as zeros
    max_steps           a cap on `steps`, which changes nothing before it
    measure_every       the noise scale is measured at the first full step of more than one worker at or after each
                        multiple of it (0: never)
    """

    def __init__(
        self,
        samples: int,
        samples_per_worker: int,
        stages: list[Stage],
        epochs: int,
        last_batch: str,
        warmup: Warmup,
        max_steps: int | None = None,
        measure_every: int = 0,
    ):
        self.measure_every = measure_every
        self.samples, self.samples_per_worker = samples, samples_per_worker
        self.stages, self.epochs, self.last_batch, self.warmup = tuple(stages), epochs, last_batch, warmup
        self._stage_epochs = [s.first_epoch for s in stages]
        self._stage_steps = []
        step = 0
        for i, stage in enumerate(self.stages):
            end = self.stages[i + 1].first_epoch if i + 1 < len(self.stages) else epochs
            self._stage_steps.append(step)
            step += (end - stage.first_epoch) * self._epoch_steps(stage)
        self.full_steps = step
        self.steps = step if max_steps is None else min(step, max_steps)
        self.warmup_steps = self.first_step(int(warmup.epochs)) + round(
            (warmup.epochs % 1) * self.steps_in_epoch(min(int(warmup.epochs), epochs - 1))
        )

    def _epoch_steps(self, stage: Stage) -> int:
        kn = stage.workers * self.samples_per_worker
        return self.samples // kn if self.last_batch == "drop" else -(-self.samples // kn)

    def stage_of_epoch(self, epoch: int) -> int:
        """Index of the stage that `epoch` belongs to."""
        return bisect.bisect_right(self._stage_epochs, epoch) - 1

    def steps_in_epoch(self, epoch: int) -> int:
        return self._epoch_steps(self.stages[self.stage_of_epoch(epoch)])

    def first_step(self, epoch: int) -> int:
        """The step that starts `epoch`; `epoch` may be one past the last."""
        i = self.stage_of_epoch(epoch)
        return self._stage_steps[i] + (epoch - self.stages[i].first_epoch) * self._epoch_steps(self.stages[i])

    def at(self, step: int) -> Point:
        """Everything about one step, 0 <= step < full_steps."""
        if not 0 <= step < self.full_steps:
            raise IndexError(f"step {step} is outside the schedule's {self.full_steps} steps")
        stage, epochs_in, in_epoch = self._place(step)
        epoch = stage.first_epoch + epochs_in
        kn = stage.workers * self.samples_per_worker
        first = in_epoch * kn
        count = min(kn, self.samples - first)
        lr = self._lr(step, stage, epoch + in_epoch / self._epoch_steps(stage))
        n, measured = self.samples_per_worker, self._measured(step)
        return Point(step, epoch, in_epoch, lr, stage.momentum, stage.workers, n, first, count, measured)

    def samples_ahead(self, step: int) -> int:
        """Samples from this step to the end of the run, dropped ones included; whatever the batch will be."""
        if step >= self.steps:
            return 0
        here, last = self.at(step), self.at(self.steps - 1)
        return (last.epoch - here.epoch) * self.samples + last.first + last.count - here.first

    def spans(self) -> list[tuple[Stage, int, int]]:
        """(stage, first step, step after its last) of every stage, in order."""
        ends = [*self._stage_steps[1:], self.full_steps]
        return list(zip(self.stages, self._stage_steps, ends, strict=True))

    def _place(self, step: int) -> tuple[Stage, int, int]:
        """(the step's stage, epochs since its first, step in the epoch)."""
        i = bisect.bisect_right(self._stage_steps, step) - 1
        stage = self.stages[i]
        return stage, *divmod(step - self._stage_steps[i], self._epoch_steps(stage))

    def _measurable(self, step: int) -> bool:
        """A full step of more than one worker."""
        stage, _, in_epoch = self._place(step)
        return stage.workers > 1 and (in_epoch + 1) * stage.workers * self.samples_per_worker <= self.samples

    def _measured(self, step: int) -> bool:
        if not self.measure_every or not self._measurable(step):
            return False
        return not any(self._measurable(s) for s in range(step - step % self.measure_every, step))

    def _lr(self, step: int, stage: Stage, epoch: float) -> float:
        if step < self.warmup_steps:
            start = min(self.warmup.start_lr, stage.lr)
            if self.warmup.kind == "constant":
                return start
            return start + (stage.lr - start) * step / self.warmup_steps
        if stage.shape == "constant":
            return stage.lr
        if callable(stage.shape):
            return stage.lr * float(stage.shape(epoch))
        begin = max(self.warmup.epochs, stage.first_epoch)
        progress = max(0.0, epoch - begin) / (self.epochs - begin)  # a warm-up is rounded to whole steps
        if stage.shape == "cosine":
            return stage.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if stage.shape != "polynomial":
            raise AssertionError(f"no schedule has the shape {stage.shape}")
        remaining: float = (1 - progress) ** stage.power
        return stage.lr * remaining


class Segments(Schedule):
    """A schedule that another goes on from at `step`: `later` in all but what was before.

    Raises ValueError where the two do not meet: a step's place in its epoch, and its batch, must follow from the step
    before it.
    """

    def __init__(self, before: Schedule, step: int, later: Schedule):
        vars(self).update(vars(later))
        self.before, self.seam, self.later = before, step, later
        for number in (step - 1, step):
            if 0 <= number < min(before.full_steps, later.full_steps):
                old, new = before.at(number), later.at(number)
                if (old.epoch, old.first, old.count, old.workers) != (new.epoch, new.first, new.count, new.workers):
                    raise ValueError(
                        f"it would move steps that were taken (step {number} is in epoch {old.epoch + 1} at a batch of "
                        f"{old.global_batch}, not in epoch {new.epoch + 1} at {new.global_batch}); change only what is "
                        "ahead"
                    )
        if step > later.full_steps:
            raise ValueError(f"the run has taken {step} steps, and would have {later.full_steps}")

    def at(self, step: int) -> Point:
        return (self.before if step < self.seam else self.later).at(step)

    def spans(self) -> list[tuple[Stage, int, int]]:
        before = [(stage, first, min(stop, self.seam)) for stage, first, stop in self.before.spans()]
        later = [(stage, max(first, self.seam), stop) for stage, first, stop in self.later.spans()]
        return [(stage, first, stop) for stage, first, stop in before + later if first < stop]


# ---------------------------------------------------------------- stages, by paper


def step_decay(workers: int, lr: float, momentum: float, milestones: list[int], factor: float) -> list[Stage]:
    """The learning rate divided by `factor` at each milestone epoch (Goyal et al. 2017, section 5.1; Smith et al. 2018,
    "decaying learning rate")."""
    return [Stage(epoch, workers, lr / factor**i, momentum) for i, epoch in enumerate([0, *milestones])]


def capped_step(batch: int, lr: float, factor: float, max_batch: int | None) -> tuple[int, float]:
    """Divide the noise scale by `factor`: by growing the batch as far as `max_batch`, by the learning rate for the rest
    (Smith et al. 2018, section 3: r = min(f, B_max/B); B <- B*r; eps <- eps / (f/r)).

    Raises ValueError where the batch would not be whole.
    """
    grown = batch * factor if max_batch is None else min(batch * factor, max_batch)
    if grown != int(grown):
        raise ValueError(f"a batch of {batch} times {factor:g} is not whole")
    return int(grown), lr / (factor * batch / grown)


def growing_batch(
    workers: int,
    lr: float,
    momentum: float,
    milestones: list[int],
    factor: float,
    max_workers: int | None,
    grow_at: int,
) -> list[Stage]:
    """At each of the first `grow_at` milestones the batch grows, by workers; afterwards the learning rate falls.

    Smith et al. 2018, section 5.1: grow_at = len(milestones) is "increasing batch size", 1 is "hybrid".
    """
    stages = [Stage(0, workers, lr, momentum)]
    for i, epoch in enumerate(milestones):
        if i < grow_at:
            workers, lr = capped_step(workers, lr, factor, max_workers)
        else:
            lr = lr / factor
        stages.append(Stage(epoch, workers, lr, momentum))
    return stages


# Akiba et al. 2017: shares of the reference learning rate over 90 epochs, so that the start is slow at 32k
SLOW_START = ((0, 0.5), (40, 0.075), (70, 0.01), (85, 0.001))


def slow_start(workers: int, lr: float, momentum: float, epochs: int) -> list[Stage]:
    """Akiba et al. 2017: 0.5, 0.075, 0.01, 0.001 of the scaled learning rate for 40, 30, 15, 5 of 90 epochs; other
    lengths in proportion."""
    stages: dict[int, float] = {}
    for epoch, share in SLOW_START:  # in a short run the first of those that begin with an epoch holds
        if (start := round(epoch * epochs / 90)) < epochs:
            stages.setdefault(start, share)
    return [Stage(epoch, workers, lr * share, momentum) for epoch, share in stages.items()]
