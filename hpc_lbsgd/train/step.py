"""One step: this rank's workers forward and backward, one sum over ranks, one update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from hpc_lbsgd.data.order import Permutation, passes_of_rank, worker_samples
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.theory import noise
from hpc_lbsgd.theory.schedule import Point, Schedule
from hpc_lbsgd.train.losses import loss_function
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.workers import groups_in_step

# The control vector: summed once a step, beside the gradients. All ranks decide from the sums alone.
LOSS, COUNT, BAD_RANKS, BAD_RANK_SUM, STOP, CHECKPOINT, SQUARES, REPLACED = range(8)

# Losses and squared norms are rounded to multiples of these: below 2^53 units their sum is exact in float64, in any
# order, so that not even a log depends on the rank count.
LOSS_BITS = 30
SQUARE_BITS = 36


class Pass(NamedTuple):
    """Workers of one forward-backward of one rank, with how many samples each has (none has zero)."""

    workers: list[int]
    counts: list[int]


class Passes:
    """How a recipe's steps fall into passes, on one rank of `size`. Pure."""

    def __init__(self, recipe, rank: int, size: int):
        self.rank, self.size = rank, size
        self.workers_per_pass = recipe.machine.workers_per_pass
        # weight decay inside the loss would be measured as gradient
        self.measured_every = recipe.train.noise_scale_steps if recipe.optim.decay_in == "gradient" else 0

    def measures(self, point: Point) -> bool:
        """The noise scale is measured at this step: workers go one a pass. A short tail is never measured."""
        every = self.measured_every
        full = point.count == point.global_batch and point.workers > 1
        return every > 0 and (point.step + 1) % every == 0 and full

    def at(self, point: Point) -> list[Pass]:
        """This rank's passes at one step. Workers past the tail of an epoch are left out."""
        result = []
        together = 1 if self.measures(point) else self.workers_per_pass
        for workers in passes_of_rank(point.workers, self.rank, self.size, together):
            counted = [(j, stop - start) for j in workers for start, stop in [point.worker_range(j)] if stop > start]
            if counted:
                result.append(Pass([j for j, _ in counted], [c for _, c in counted]))
        return result

    def requests(self, schedule: Schedule, seed: int, first_step: int, last_step: int) -> Iterator[Request]:
        """What the loader is to make for this rank from `first_step` up to `last_step`: a request a pass."""
        permutation, epoch = None, None
        for step in range(first_step, last_step):
            point = schedule.at(step)
            if point.epoch != epoch:
                epoch = point.epoch
                permutation = Permutation(schedule.samples, seed, epoch)
            for work in self.at(point):
                yield Request(epoch, np.concatenate([worker_samples(permutation, point, j) for j in work.workers]))


@dataclass
class Outcome:
    """What every rank knows after a step."""

    loss: float  # mean over the true global batch
    count: int
    finite: bool
    bad_ranks: int  # ranks whose own loss or gradients were not finite (or out of the fixed-point range)
    bad_rank: int  # that rank, if it is one
    stop: bool
    checkpoint: bool
    measurement: noise.Measurement | None
    replaced: int  # samples that could not be had (data.on_bad_image = skip)
    data_wait_s: float  # on this rank
    exposed_comm_s: float  # from the end of this rank's backward until all sums are there


def exact(value: torch.Tensor, bits: int) -> torch.Tensor:
    """`value` as float64, rounded to a multiple of 2^-bits."""
    return (value.double() * 2.0**bits).round_() * 2.0**-bits


class Stepper:
    """Runs steps on a replica. `batches` must yield what `Passes.requests` asked for; `mark(phase, step)` hears of
    progress."""

    def __init__(
        self,
        replica: Replica,
        recipe,
        batches: Iterator[Batch],
        mark: Callable[[str, int], None] = lambda phase, step: None,
    ):
        self.replica, self.batches, self.engine, self.mark = replica, batches, replica.engine, mark
        self.passes = Passes(recipe, self.engine.rank, self.engine.size)
        self.bn_group, self.samples_per_worker = recipe.batch.group, recipe.batch.samples_per_worker
        self.loss = loss_function(recipe.train)
        self.loss_decay = recipe.optim.weight_decay if recipe.optim.decay_in == "loss" else 0.0
        self.dtype = torch.float64 if recipe.precision == "float64" else torch.float32
        self.autocast = recipe.precision == "bf16"
        self.control = torch.zeros(8, dtype=torch.float64, device=replica.device)

    def run(self, point: Point, previous_lr: float = 0.0, stop: bool = False, checkpoint: bool = False) -> Outcome:
        """One step. The weights change only if every rank's loss and gradients are finite.

        previous_lr: of the step before, for optimizers that absorb the learning rate.
        """
        replica, buckets, control = self.replica, self.replica.buckets, self.control
        if not replica.model.training:  # it visits every module
            replica.model.train()
        work, measured = self.passes.at(point), self.passes.measures(point)
        groups = groups_in_step(point, self.bn_group)
        loss_sum, squares = torch.zeros(2, dtype=torch.float64, device=replica.device)
        data_wait_s, replaced = 0.0, 0
        buckets.begin(point.workers)
        for i, (workers, counts) in enumerate(work):
            before = time.perf_counter()
            self.mark("data", point.step)
            images, labels, stand_ins = next(self.batches)
            replaced += stand_ins
            data_wait_s += time.perf_counter() - before
            self.mark("compute", point.step)
            replica.begin_pass(point.step, workers, counts, groups)
            last = i == len(work) - 1
            buckets.arm(last_pass=last, measured=measured)
            with replica.passing(sums=last and buckets.summed_elsewhere):
                loss = self._forward(images, labels, point)
                # DistributedDataParallel divides its sum by the number of ranks
                (loss * self.engine.size if buckets.summed_elsewhere else loss).backward()
            square = buckets.end_pass()
            loss_sum += exact(loss.detach(), LOSS_BITS)
            if square is not None:
                squares += exact(square, SQUARE_BITS)
        if not work:
            buckets.join_idle()
        self.mark("sum", point.step)
        before = time.perf_counter()
        bad = ~torch.isfinite(loss_sum)
        if buckets.bits is not None:
            bad |= buckets.out_of_range
        control.zero_()
        control[LOSS] = loss_sum.nan_to_num(0.0, 0.0, 0.0)
        control[COUNT] = sum(sum(w.counts) for w in work)
        control[BAD_RANKS] = bad
        control[BAD_RANK_SUM] = bad * self.engine.rank
        control[STOP], control[CHECKPOINT] = float(stop), float(checkpoint)
        control[SQUARES], control[REPLACED] = squares, replaced
        handle = self.engine.start_sum(control, "control")
        finite = buckets.finish()
        self.engine.wait(handle)
        big_square = buckets.square() if measured else control[SQUARES]
        sums = torch.cat([control, torch.stack([big_square, finite.double()])]).tolist()
        exposed_comm_s = time.perf_counter() - before
        ok = bool(sums[-1]) and sums[BAD_RANKS] == 0
        if ok:
            replica.update(point, previous_lr)
        return Outcome(
            loss=sums[LOSS],
            count=round(sums[COUNT]),
            finite=ok,
            bad_ranks=round(sums[BAD_RANKS]),
            bad_rank=round(sums[BAD_RANK_SUM]),
            stop=sums[STOP] > 0,
            checkpoint=sums[CHECKPOINT] > 0,
            measurement=self._measurement(point, sums[SQUARES], sums[-2]) if measured and ok else None,
            replaced=round(sums[REPLACED]),
            data_wait_s=data_wait_s,
            exposed_comm_s=exposed_comm_s,
        )

    def _forward(self, images: torch.Tensor, labels: torch.Tensor, point: Point) -> torch.Tensor:
        """This pass's share of the loss: divided by the true global count here, summed over ranks later
        (Goyal et al. 2017, Remark 3)."""
        with torch.autocast(self.replica.device.type, torch.bfloat16, enabled=self.autocast):
            outputs = self.replica.forward(images if self.autocast else images.to(self.dtype))
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        loss = self.loss(outputs, labels) / point.count
        if self.loss_decay:
            # each pass carries its samples' share, so that all ranks' losses sum to one decay term
            term = torch.stack([w.square().sum() for w in self.replica.decayed()]).sum()
            loss = loss + 0.5 * self.loss_decay * term * (len(labels) / point.count)
        return loss

    def _measurement(self, point: Point, squares: float, big_square: float) -> noise.Measurement:
        """Workers' gradients are shares of the mean over kn samples: a worker's own mean is k times its share."""
        small_square = point.workers * squares
        return noise.measure(small_square, big_square, self.samples_per_worker, point.global_batch)
