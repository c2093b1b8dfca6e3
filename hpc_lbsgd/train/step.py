"""Steps: this rank's workers forward and backward, one sum over ranks, one update.

A device that is not the CPU is given its work ahead of time, and would stand still while the host reads whether a step
may be taken. So it decides that itself, and leaves weights as they were where not; the host reads it late: when the
next step's backward is launched, and before its update. Both ways give the same bits and the same records.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from hpc_lbsgd.train.slow import BEGUN, COMPUTED, SUMMED, WAITING, Clock
from hpc_lbsgd.train.workers import groups_in_step

AT_ONCE = ("cpu",)  # devices that compute while they are called: nothing is gained by reading late

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

    point: Point
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
    own_s: list[float]  # seconds a sample at the last step that was read, by rank; 0: it had no samples
    step_s: float = 0.0  # on this rank, since the outcome before was dealt with


@dataclass
class UnderWay:
    """A step whose sums have begun."""

    point: Point
    pair: crosscheck.Pair | None
    control: Control
    clock: Clock
    computed: int  # samples on this rank
    data_wait_s: float
    ahead_s: float  # of it, for the next step's batch


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
        # numbers of workers for which there are graphs: the first pass of another takes as long as a compiler does
        self.compiled: set[int] | None = None if recipe.machine.compile == "none" else set()
        self._ahead: Batch | None = None  # of the pass that comes next, where it is there already
        self._begun: UnderWay | None = None
        self._late = replica.device.type not in AT_ONCE
        self.own_s = 0.0

    def run(self, point: Point, previous_lr: float = 0.0, stop: bool = False, checkpoint: bool = False) -> Outcome:
        """One step alone. previous_lr, stop, checkpoint: as for `outcomes`."""
        return next(self.outcomes([point], lambda step: previous_lr, lambda: (stop, checkpoint)))

    def outcomes(
        self,
        points: Iterable[Point],
        previous_lr: Callable[[int], float] = lambda step: 0.0,
        asked: Callable[[], tuple[bool, bool]] = lambda: (False, False),
        settles: Callable[[int], bool] = lambda step: False,
    ) -> Iterator[Outcome]:
        """What each step came to. The weights change only if every rank's loss and gradients are finite, and no rank
        computed other bits.

        Where this yields, weights are those after the step in question, all its effects on later ones may be settled,
        and the next step's update has not begun, even if its sums have. Who does not go on from there calls `drop`.

        previous_lr: of the update before a step (0: there was none), for optimizers that absorb the learning rate.
        asked: for each step, whether this rank was asked for the run's end, and for a checkpoint. settles: steps after
        which something else comes first, which are read at once.
        """
        since = time.perf_counter()
        for outcome in self._each(points, previous_lr, asked, settles):
            outcome.step_s = time.perf_counter() - since
            yield outcome
            since = time.perf_counter()

    def _each(self, points, previous_lr, asked, settles) -> Iterator[Outcome]:
        """`outcomes`, whose seconds are still to be taken."""
        late: UnderWay | None = None
        for point in points:
            self._begin(point, *asked())
            if late:
                self.mark("sum", late.point.step)
                yield self._outcome(late)
            step, self._begun = self._begun, None
            self.mark("sum", point.step)
            ok = step.control.finish()
            step.clock.mark()
            if self._may_wait(step) and not settles(point.step):
                self.replica.update(point, previous_lr(point.step), ok)
                late = step
                continue
            late, outcome = None, self._outcome(step)
            if outcome.finite:
                self.replica.update(point, previous_lr(point.step))
            yield outcome
        if late:
            yield self._outcome(late)

    def drop(self) -> None:
        """Give up the step that has begun, if one has: its sums end, and nobody takes them."""
        step, self._begun = self._begun, None
        if step:
            step.control.drop()

    def _may_wait(self, step: UnderWay) -> bool:
        """Whether the device can tell by itself if a step may be taken: not where ranks compare what they computed,
        where the next step's units follow from this one's sums, or where the optimizer must not be called in vain."""
        compared = step.pair or step.point.measured or self.replica.buckets.scales
        return self._late and self.replica.optimizer.masked and not compared

    # ---------------------------------------------------------------- forward and backward

    def _take(self) -> Batch:
        batch, self._ahead = self._ahead, None
        return next(self.batches) if batch is None else batch

    def _fetch(self) -> None:
        """The next pass's batch; a step without samples on this rank leaves the one that is there."""
        if self._ahead is None:
            self._ahead = next(self.batches, None)

    def _bounds(self, pair: crosscheck.Pair | None) -> tuple[int, int]:
        """Where ranks' own times lie among the slots: after digests, before bounds of int32 sums."""
        times = OWN + (self.slots.length if pair else 0)
        return times, times + self.engine.size

    def _begin(self, point: Point, stop: bool, checkpoint: bool) -> None:
        """This rank's passes; afterwards all sums are under way."""
        replica, buckets = self.replica, self.replica.buckets
        clock = Clock(replica.device)
        clock.mark()
        replica.train()
        work, measured = self.passes.at(point), point.measured
        groups, pair = groups_in_step(point, self.bn_group), self.passes.pair_at(point)
        (times, bounds), scales = self._bounds(pair), buckets.scales
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
            inputs, labels, stand_ins = self._take()
            replaced += 0 if again else stand_ins
            data_wait_s += time.perf_counter() - before
            self.mark("compute" if self.compiled is None or len(workers) in self.compiled else "compile", point.step)
            replica.begin_pass(point.step, workers, counts)
            last = i == len(work) - 1 and not again
            digests: dict[int, torch.Tensor] = {}
            compared = pair is not None and workers[0] == pair.worker
            keep = (lambda b, values, into=digests: into.update({b: crosscheck.digest([values])})) if compared else None
            buckets.arm(last, measured and not again, keep, apart=again)
            with replica.passing(sums=last and buckets.summed_elsewhere):
                loss = self.loss(replica.forward(inputs, groups), labels)
                if not again:
                    control.losses[workers[0]] = loss.detach()
                loss = replica.share(loss, sum(counts), point)
                # DistributedDataParallel divides its sum by the number of ranks
                (loss * self.engine.size if buckets.summed_elsewhere else loss).backward()
            square = buckets.end_pass()
            replica.end_pass()
            if self.compiled is not None:
                self.compiled.add(len(workers))
            if square is not None:
                control.squares[workers[0]] = square
            if compared:
                mixed = crosscheck.mixed(digests[b] for b in sorted(digests))
                self.slots.write_worker(more[OWN:times], again, mixed)
        clock.mark()
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
        clock.mark()
        computed = sum(sum(w.counts) for w in work)
        self._begun = UnderWay(point, pair, control, clock, computed, data_wait_s + ahead_s, ahead_s)

    # ---------------------------------------------------------------- what it came to

    def _outcome(self, step: UnderWay) -> Outcome:
        """Read a step's sums, and settle what they decide of int32 sums to come."""
        pair, scales, clock = step.pair, self.replica.buckets.scales, step.clock
        sums = step.control.read()
        computed_s = clock.seconds(BEGUN, COMPUTED) + step.ahead_s
        self.own_s = computed_s / step.computed if step.computed else 0.0
        told, (times, bounds) = sums.more, self._bounds(pair)
        mismatch = self.slots.read(told[OWN:times], pair) if pair else None
        sound = sums.sound and mismatch is None
        of_all = scales.read(told[bounds:]) if scales else []
        overflow = scales.overflow(of_all) if scales and sound else []
        ok = sound and not overflow
        if scales and mismatch is None:
            scales.settle(of_all if ok else None, bool(overflow), step.point.share)
        return Outcome(
            point=step.point,
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
            data_wait_s=step.data_wait_s,
            exposed_comm_s=clock.seconds(WAITING, SUMMED),
            own_s=told[times:bounds],
        )
