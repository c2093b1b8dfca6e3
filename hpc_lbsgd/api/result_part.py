"""What a run's steps follow from, beside model, optimizer and data: seeds, groups, units and the schedule. A file holds
it, so that steps do not go on under another without a word."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from typing import Any

import numpy as np

from hpc_lbsgd.api.shuffle import GlobalShuffle, Step
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory.schedule import Schedule

POINTS = 64  # of a schedule, whose learning rates are kept; and steps 1, 2, 4, 8 ..., for a warm-up is at the start
SAME = 1e-9  # relative: another machine's cosine differs in its last bits

ResultPart = dict[str, Any]  # by the name that a person knows


class Past:
    """Of a run's steps so far: their result part."""

    def __init__(self, determinism: str, seed: int, bn_group: int | None, fixed_point_bits: int):
        self._bn_group = bn_group
        self._own: ResultPart = {"lb.distribute(seed)": seed, "lb.init(determinism)": determinism}
        if determinism == "any-ranks":
            self._own["lb.distribute(fixed_point_bits)"] = fixed_point_bits
        self._saved: ResultPart | None = None
        self._where = ""
        self._shuffle: GlobalShuffle | None = None

    def load(self, saved: ResultPart | None, where: str) -> None:
        """From a file. saved: what it has of its steps, if it says. where: what to call it; empty where steps of
        another result part may follow."""
        self._saved, self._where, self._shuffle = saved, where, None

    def follow(self, step: Step, rank: int) -> None:
        """A step is about to begin. Raises RequestError for the first after a file's under another result part; all
        ranks do, for they have read one file and go through one shuffle."""
        if self._shuffle is None and self._where and step.step:
            if self._saved is not None:
                refuse_other(self._saved, self._under(step.shuffle), step.step, self._where)
            elif rank == 0:
                warnings.warn(
                    f"{self._where}: has no seeds and no schedule, as files from before they were kept: whether its "
                    "steps were taken under these is not known",
                    stacklevel=5,
                )

    def taken(self, step: Step) -> None:
        """It was: from here on the run's steps are of its shuffle."""
        self._shuffle = step.shuffle

    def result_part(self) -> ResultPart | None:
        """None where there are no steps, or the file that they are in does not say."""
        return self._saved if self._shuffle is None else self._under(self._shuffle)

    def _under(self, shuffle: GlobalShuffle) -> ResultPart:
        group = self._bn_group or shuffle.schedule.samples_per_worker
        return {**of_shuffle(shuffle), "lb.distribute(bn_group)": group, **self._own}


def of_shuffle(shuffle: GlobalShuffle) -> ResultPart:
    return {"lb.GlobalShuffle(seed)": shuffle.seed, **of_schedule(shuffle.schedule)}


def of_schedule(schedule: Schedule) -> ResultPart:
    """As a function of the step. Without its cap (`max_steps`) and its measurements, which change nothing."""
    spans = schedule.spans()
    facts = {
        "samples": schedule.samples,
        "samples_per_worker": schedule.samples_per_worker,
        "last_batch": schedule.last_batch,
        "epochs": schedule.epochs,
        "stages": [first for _, first, _ in spans],
        "workers": [stage.workers for stage, _, _ in spans],
        "lr": [float(stage.lr) for stage, _, _ in spans],
        "momentum": [float(stage.momentum) for stage, _, _ in spans],
        "steps": schedule.full_steps,
    }
    last = int(schedule.full_steps)
    points = {*range(0, last, max(1, last // POINTS)), *(2**i for i in range(last.bit_length()) if 2**i < last)}
    facts |= {f"lr at step {step}": float(schedule.at(step).lr) for step in sorted(points)}
    return {f"schedule.{name}": value for name, value in facts.items()}


def refuse_other(saved: ResultPart, now: ResultPart, step: int, where: str) -> None:
    for name, value in now.items():
        if name in saved and not same(saved[name], value):
            raise RequestError(
                f"{where}: its steps were taken under {name} = {saved[name]}, and this is {value}: the result would be "
                f"that of neither. To go on with what is new from step {step} on, lb.load(path, run, amend=True); to "
                "begin anew with its weights, run.step = 0"
            )


def same(saved: Any, now: Any) -> bool:
    """Of numbers, words and lists of them. saved: of a file, which may hold anything."""
    now = now.item() if isinstance(now, np.generic) else now  # which files do not have
    if isinstance(now, list):
        alike = isinstance(saved, list) and len(saved) == len(now)
        return alike and all(same(*pair) for pair in zip(saved, now, strict=True))
    if isinstance(now, float):
        with suppress(OverflowError):  # a whole number of a file that no float is
            return isinstance(saved, (float, int)) and math.isclose(saved, now, rel_tol=SAME)
        return False
    return type(saved) is type(now) and bool(saved == now)
