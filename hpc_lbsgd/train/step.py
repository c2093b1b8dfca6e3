"""One step: this rank's workers forward and backward, one sum over ranks, one update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import NamedTuple

import torch

from hpc_lbsgd.data.order import passes_of_rank, samples_in_order
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.theory import noise
from hpc_lbsgd.theory.schedule import Point, Schedule
from hpc_lbsgd.train import crosscheck
from hpc_lbsgd.train.control import COUNT_FLUSHED_EVERY, Control
from hpc_lbsgd.train.losses import loss_function
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.slow import OwnTime
from hpc_lbsgd.train.workers import groups_in_step

STOP, CHECKPOINT, REPLACED, OWN = range(4)  # of the control vector, in front of what else is added to it


class Pass(NamedTuple):
    """Workers of one forward-backward of one rank, with how many samples each has (none has zero)."""

    workers: list[int]
    counts: list[int]
    again: bool = False  # another rank's worker, computed for comparison alone


class Passes:
    """How a recipe's steps fall into passes, on one rank of `size`. Pure."""

    def __init__(self, recipe, rank: int, size: int, partners: Sequence[int] | None = None):
        """partners: who computes a rank's worker again (`crosscheck.checkers`); None: nobody does."""
        self.rank, self.size = rank, size
        self.workers_per_pass = recipe.machine.workers_per_pass
        self.partners = partners or ()
        self.check_every = recipe.machine.cross_check_steps if recipe.determinism == "any-ranks" and partners else 0

    def pair_at(self, point: Point) -> crosscheck.Pair | None:
        """The worker that two ranks compute at this step, if one is."""
        return crosscheck.pair_at(point, self.check_every, self.partners)

    def at(self, point: Point) -> list[Pass]:
        """This rank's passes at one step. Workers past the tail of an epoch are left out."""
        result, pair = [], self.pair_at(point)
        if pair and pair.checker == self.rank:
            start, stop = point.worker_range(pair.worker)
            result.append(Pass([pair.worker], [stop - start], again=True))
        together = 1 if point.measured else self.workers_per_pass
        for workers in passes_of_rank(point.workers, self.rank, self.size, together):
            counted = [(j, stop - start) for j in workers for start, stop in [point.worker_range(j)] if stop > start]
            if counted:
                result.append(Pass([j for j, _ in counted], [c for _, c in counted]))
        return result

    def requests(self, schedule: Schedule, seed: int, first_step: int, last_step: int) -> Iterator[Request]:
        """What the loader is to make for this rank from `first_step` up to `last_step`: a request a pass."""
        found = samples_in_order(
            schedule, seed, range(first_step, last_step), lambda point: [work.workers for work in self.at(point)]
        )
        return starmap(Request, found)


@dataclass
class Outcome:
    """What every rank knows after a step."""

    loss: float  # mean over the true global batch, without a decay term
    count: int
    finite: bool
    overflow: list[str]  # tensors whose int32 sums may have wrapped; the step was not taken, and the next is to be it
    bad_ranks: int  # ranks whose own loss or gradients were not finite (or out of the fixed-point range)
    bad_rank: int | None  # that rank, if it is one
    stop: bool
    checkpoint: bool
    measurement: noise.Measurement | None
    replaced: int  # samples that could not be had (data.on_bad_image = skip)
    flushed: float | None  # share of gradients that fixed point or a float16 wire made zero, where it was counted
    mismatch: crosscheck.Mismatch | None  # ranks that computed different bits; the step was not taken
    data_wait_s: float  # on this rank, for this step's first batch and the one after its last
    exposed_comm_s: float  # from the end of this rank's backward, and the next batch, until all sums are there
    own_s: list[float]  # seconds a sample at the step before, by rank; 0: it had no samples


class Stepper:
    """Runs steps on a replica. `batches` must yield what `Passes.requests` asked for; `mark(phase, step)` hears of
    progress."""

    def __init__(
        self,
        replica: Replica,
        recipe,
        batches: Iterator[Batch],
        mark: Callable[[str, int], None] = lambda phase, step: None,
        partners: Sequence[int] | None = None,
    ):
        self.replica, self.batches, self.engine, self.mark = replica, batches, replica.engine, mark
        self.passes = Passes(recipe, self.engine.rank, self.engine.size, partners)
        self.slots = crosscheck.Slots(self.engine.size)
        self.bn_group = recipe.batch.group
        self.loss = loss_function(recipe.train)
        self._ahead: Batch | None = None  # of the pass that comes next, where it is there already
        self.time, self.own_s = OwnTime(replica.device), 0.0

    def _take(self) -> Batch:
        batch, self._ahead = self._ahead, None
        return next(self.batches) if batch is None else batch

    def _fetch(self) -> None:
        """The next pass's batch; a step without samples on this rank leaves the one that is there."""
        if self._ahead is None:
            self._ahead = next(self.batches, None)

    def run(self, point: Point, previous_lr: float = 0.0, stop: bool = False, checkpoint: bool = False) -> Outcome:
        """One step. The weights change only if every rank's loss and gradients are finite.

        previous_lr: of the update before (0: there was none), for optimizers that absorb the learning rate.
        """
        replica, buckets = self.replica, self.replica.buckets
        self.time.begin()
        replica.train()
        work, measured = self.passes.at(point), point.measured
        groups, pair = groups_in_step(point, self.bn_group), self.passes.pair_at(point)
        times = OWN + (self.slots.length if pair else 0)
        bounds, scales = times + self.engine.size, buckets.scales
        control = Control(point, buckets, bounds + (scales.length if scales else 0))
        more = control.more
        more[times + self.engine.rank] = self.own_s
        if pair:
            self.slots.write(more[OWN:times], self.engine.rank, replica.digest())
        data_wait_s, replaced = 0.0, 0
        # with int32 at the step after, too: a run's first is in int64
        buckets.begin(point.workers, count_flushed=point.step % COUNT_FLUSHED_EVERY in ((0, 1) if scales else (0,)))
        for i, (workers, counts, again) in enumerate(work):
            before = time.perf_counter()
            self.mark("data", point.step)
            images, labels, stand_ins = self._take()
            replaced += 0 if again else stand_ins
            data_wait_s += time.perf_counter() - before
            self.mark("compute", point.step)
            replica.begin_pass(point.step, workers, counts)
            last = i == len(work) - 1 and not again
            digests: dict[int, torch.Tensor] = {}
            compared = pair is not None and workers[0] == pair.worker
            keep = (lambda b, values, into=digests: into.update({b: crosscheck.digest([values])})) if compared else None
            buckets.arm(last, measured and not again, keep, apart=again)
            with replica.passing(sums=last and buckets.summed_elsewhere):
                loss = self.loss(replica.forward(images, groups), labels)
                if not again:
                    control.losses[workers[0]] = loss.detach()
                loss = replica.share(loss, sum(counts), point)
                # DistributedDataParallel divides its sum by the number of ranks
                (loss * self.engine.size if buckets.summed_elsewhere else loss).backward()
            square = buckets.end_pass()
            replica.end_pass()
            if square is not None:
                control.squares[workers[0]] = square
            if compared:
                mixed = crosscheck.mixed(digests[b] for b in sorted(digests))
                self.slots.write_worker(more[OWN:times], again, mixed)
        self.time.end()
        if all(w.again for w in work):
            buckets.join_idle()
        if scales:
            scales.write(more[bounds:])
        more[STOP], more[CHECKPOINT], more[REPLACED] = float(stop), float(checkpoint), replaced
        control.start(sum(sum(w.counts) for w in work if not w.again))
        before = time.perf_counter()
        self.mark("data", point.step)
        self._fetch()  # while the sums are under way, and a GPU has backward left to do
        ahead_s = time.perf_counter() - before
        data_wait_s += ahead_s
        self.mark("sum", point.step)
        before = time.perf_counter()
        sums = control.finish()
        exposed_comm_s = time.perf_counter() - before
        computed = sum(sum(w.counts) for w in work)
        self.own_s = (self.time.seconds() + ahead_s) / computed if computed else 0.0
        told = sums.more
        mismatch = self.slots.read(told[OWN:times], pair) if pair else None
        sound = sums.sound and mismatch is None
        of_all = scales.read(told[bounds:]) if scales else []
        overflow = scales.overflow(of_all) if scales and sound else []
        ok = sound and not overflow
        if ok:
            replica.update(point, previous_lr)
        if scales and mismatch is None:
            scales.settle(of_all if ok else None, again=bool(overflow))
        return Outcome(
            loss=sums.loss,
            count=sums.count,
            finite=ok,
            overflow=overflow,
            bad_ranks=sums.bad_ranks,
            bad_rank=sums.bad_rank,
            stop=told[STOP] > 0,
            checkpoint=told[CHECKPOINT] > 0,
            measurement=sums.measurement if ok else None,
            replaced=round(told[REPLACED]),
            flushed=sums.flushed,
            mismatch=mismatch,
            data_wait_s=data_wait_s,
            exposed_comm_s=exposed_comm_s,
            own_s=told[times:bounds],
        )
