"""What every rank knows after a step's sum, and the vector that says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.theory import noise
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train.step import measurement_of

# The control vector, summed once a step beside the gradients; after these a slot a worker for its loss, then one for
# its squared norm, so that they do not depend on the rank count either.
COUNT, BAD_RANKS, BAD_RANK_SUM, NONZERO, FLUSHED, WORKERS = range(6)


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
    def of(cls, point: Point, sums: Sequence[float]) -> Verdict:
        """From the control vector, with the sum's squared norm and whether it is finite behind it. Raises RunError on
        all ranks where samples are missing."""
        k, count, bad_ranks = point.workers, round(sums[COUNT]), round(sums[BAD_RANKS])
        of_workers, squares = sums[WORKERS : WORKERS + k], sums[WORKERS + k : WORKERS + 2 * k]
        if count != point.count:
            raise RunError(
                f"run.reduce: step {point.step} has {point.count} samples, and all ranks together computed {count}: "
                "they have not gone through the same step's parts",
                everywhere=True,
            )
        finite = bool(sums[-1]) and not bad_ranks
        return cls(
            finite=finite,
            loss=math.fsum(of_workers) / count if all(map(math.isfinite, of_workers)) else math.nan,
            count=count,
            bad_ranks=bad_ranks,
            bad_rank=round(sums[BAD_RANK_SUM]) if bad_ranks == 1 else None,
            measurement=measurement_of(point, squares, sums[-2]) if point.measured and finite else None,
            flushed=sums[FLUSHED] / sums[NONZERO] if sums[NONZERO] else None,
        )
