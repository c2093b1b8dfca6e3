"""The control vector: what all ranks know after a step, summed once beside the gradients. They decide from it alone.

Behind its head come a slot a worker for its loss, and one for its squared norm: x + 0 is exact at any magnitude, in any
order, so that not even a log depends on the rank count. Then what its user adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.theory import noise
from hpc_lbsgd.theory.schedule import Point

COUNT, BAD_RANKS, BAD_RANK_SUM, NONZERO, FLUSHED, WORKERS = range(6)
COUNT_FLUSHED_EVERY = 100  # steps; it takes two more passes over the gradients


class Sums(NamedTuple):
    """Of a step, over all ranks."""

    sound: bool  # every rank's losses and gradients, and their sums, are finite and in range
    loss: float  # mean over the step's samples, without a decay term
    count: int  # samples
    bad_ranks: int  # ranks whose own losses or gradients were not finite, or beyond fixed point's range
    bad_rank: int | None  # that rank, if it is one
    flushed: float | None  # share of gradients that fixed point or a float16 wire made zero, where it was counted
    measurement: noise.Measurement | None
    more: list[float]


class Reading:
    """A vector of float64 on its way to the host, which goes on meanwhile and asks for it later."""

    def __init__(self, vector: torch.Tensor):
        self._values, self._there = vector, None
        if vector.is_cuda:
            self._values = torch.empty_like(vector, device="cpu", pin_memory=True)
            self._values.copy_(vector, non_blocking=True)
            self._there = torch.cuda.Event(blocking=True)  # asleep, not spinning: loaders want the core
            self._there.record()

    def tolist(self) -> list[float]:
        """Its values, once the device has come so far."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()


class Control:
    """One step's, on this rank. more: slots of its user's own."""

    def __init__(self, point: Point, buckets: Buckets, more: int = 0):
        self.point, self.buckets, self.engine = point, buckets, buckets.engine
        k = point.workers
        self.vector = torch.zeros(WORKERS + 2 * k + more, dtype=torch.float64, device=buckets.device)
        self.losses, self.squares, self.more = self.vector[WORKERS:].split([k, k, more])

    def start(self, count: int) -> None:
        """Begin the sum, after those of all buckets: some engines match sums by order. count: this rank's samples."""
        buckets, vector = self.buckets, self.vector
        bad = ~torch.isfinite(self.losses.sum())
        if buckets.fixed:
            bad |= buckets.fixed.out_of_range
        if buckets.flushed is not None:
            vector[NONZERO : FLUSHED + 1] = buckets.flushed
        vector[COUNT] = count
        vector[BAD_RANKS] = bad
        vector[BAD_RANK_SUM] = bad * self.engine.rank
        self._handle = self.engine.start_sum(vector, "control")

    def finish(self) -> torch.Tensor:
        """Wait for all sums of the step: on a GPU its stream does, not the host, where the engine knows how. Returns
        `Sums.sound`, a bool scalar on the device."""
        finite = self.buckets.finish()
        self.engine.wait(self._handle)
        sound = finite & (self.vector[BAD_RANKS] == 0)
        big_square = self.buckets.square() if self.point.measured else self.vector[COUNT]
        self._reading = Reading(torch.cat([self.vector, torch.stack([big_square, sound.double()])]))
        return sound

    def drop(self) -> None:
        """In place of `finish`: the sums end, and nobody takes them."""
        self.buckets.drop()
        self.engine.wait(self._handle)

    def read(self) -> Sums:
        """After `finish`, now or later. The one place where the host waits for the device."""
        found = self._reading.tolist()
        k, count, bad_ranks = self.point.workers, round(found[COUNT]), round(found[BAD_RANKS])
        losses, squares = found[WORKERS : WORKERS + k], found[WORKERS + k : WORKERS + 2 * k]
        sound = bool(found[-1])
        return Sums(
            sound=sound,
            loss=math.fsum(losses) / count if all(map(math.isfinite, losses)) else math.nan,
            count=count,
            bad_ranks=bad_ranks,
            bad_rank=round(found[BAD_RANK_SUM]) if bad_ranks == 1 else None,
            flushed=found[FLUSHED] / found[NONZERO] if found[NONZERO] else None,
            measurement=measurement_of(self.point, squares, found[-2]) if self.point.measured and sound else None,
            more=found[WORKERS + 2 * k : -2],
        )


def measurement_of(point: Point, squares: Sequence[float], big_square: float) -> noise.Measurement:
    """squares: by worker, of its gradient. Workers' gradients are shares of the mean over kn samples: a worker's own
    mean is k times its share."""
    small_square = point.workers * math.fsum(squares)
    return noise.measure(small_square, big_square, point.samples_per_worker, point.global_batch)
