"""What a script is told after a step's sum."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.theory import noise
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train.control import Sums


@dataclass(frozen=True)
class Verdict:
    """What every rank knows after a sum; true where every rank's losses and gradients are finite."""

    finite: bool
    loss: float  # mean over the step's samples, over all ranks
    count: int  # samples of the step
    bad_ranks: int  # ranks whose own losses or gradients were not finite, or beyond fixed point's range
    bad_rank: int | None  # that rank, if it is one
    measurement: noise.Measurement | None  # where the schedule measures the noise scale
    flushed: float | None = None  # share of gradients that fixed point made zero, at the steps that count it

    def __bool__(self) -> bool:
        return self.finite

    @classmethod
    def of(cls, point: Point, sums: Sums) -> Verdict:
        """Raises RunError on all ranks where samples are missing."""
        if sums.count != point.count:
            raise RunError(
                f"run.reduce: step {point.step} has {point.count} samples, and all ranks together computed "
                f"{sums.count}: they have not gone through the same step's parts",
                everywhere=True,
            )
        return cls(sums.sound, sums.loss, sums.count, sums.bad_ranks, sums.bad_rank, sums.measurement, sums.flushed)
