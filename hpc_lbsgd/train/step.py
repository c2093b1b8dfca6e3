"""One step: this rank's workers forward and backward, one sum over ranks, one update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from hpc_lbsgd.data.loader import Batch
from hpc_lbsgd.data.order import Permutation, passes_of_rank, worker_samples
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.theory.schedule import Point, Schedule
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.workers import groups_in_step

# The control vector: summed once a step, beside the gradients. All ranks decide from the sums alone.
LOSS, COUNT, BAD_RANKS, BAD_RANK_SUM, STOP, CHECKPOINT = range(6)

# Losses are rounded to multiples of 2^-30: below 2^23 their sum is exact in float64, in any order.
LOSS_BITS = 30


class Pass(NamedTuple):
    """Workers of one forward-backward of one rank, with how many samples each has (none has zero)."""

    workers: list[int]
    counts: list[int]


def passes(point: Point, rank: int, size: int, workers_per_pass: int) -> list[Pass]:
    """This rank's passes at one step. Workers past the tail of an epoch are left out."""
    result = []
    for workers in passes_of_rank(point.workers, rank, size, workers_per_pass):
        counted = [(j, stop - start) for j in workers for start, stop in [point.worker_range(j)] if stop > start]
        if counted:
            result.append(Pass([j for j, _ in counted], [c for _, c in counted]))
    return result


def requests(
    schedule: Schedule, seed: int, rank: int, size: int, workers_per_pass: int, first_step: int, last_step: int
) -> Iterator[Request]:
    """What the loader is to make for this rank from `first_step` up to `last_step`: a request a pass."""
    permutation, epoch = None, None
    for step in range(first_step, last_step):
        point = schedule.at(step)
        if point.epoch != epoch:
            epoch = point.epoch
            permutation = Permutation(schedule.samples, seed, epoch)
        for work in passes(point, rank, size, workers_per_pass):
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
    data_wait_s: float  # on this rank
    exposed_comm_s: float  # from the end of this rank's backward until all sums are there


class Stepper:
    """Runs steps on a replica. `batches` must yield what `requests` asked for; `mark(phase, step)` hears of
    progress."""

    def __init__(
        self,
        replica: Replica,
        recipe,
        batches: Iterator[Batch],
        mark: Callable[[str, int], None] = lambda phase, step: None,
    ):
        self.replica, self.batches, self.engine, self.mark = replica, batches, replica.engine, mark
        self.workers_per_pass = recipe.machine.workers_per_pass
        self.bn_group = recipe.batch.group
        self.dtype = torch.float64 if recipe.precision == "float64" else torch.float32
        self.autocast = recipe.precision == "bf16"
        device = replica.device
        self.control = torch.zeros(6, dtype=torch.float64, device=device)

    def run(self, point: Point, stop: bool = False, checkpoint: bool = False) -> Outcome:
        """One step. The weights change only if every rank's loss and gradients are finite."""
        replica, context, buckets, control = self.replica, self.replica.context, self.replica.buckets, self.control
        replica.model.train()
        work = passes(point, self.engine.rank, self.engine.size, self.workers_per_pass)
        groups = groups_in_step(point, self.bn_group)
        loss_sum = torch.zeros((), dtype=torch.float64, device=replica.device)
        data_wait_s = 0.0
        buckets.begin(point.workers)
        for i, (workers, counts) in enumerate(work):
            before = time.perf_counter()
            self.mark("data", point.step)
            images, labels = next(self.batches)
            data_wait_s += time.perf_counter() - before
            self.mark("compute", point.step)
            context.begin(point.step, workers, counts, groups)
            buckets.arm(last_pass=i == len(work) - 1)
            with torch.autocast(replica.device.type, torch.bfloat16, enabled=self.autocast):
                outputs = replica.model(images if self.autocast else images.to(self.dtype))
            # Goyal et al. 2017, Remark 3: divided by the true global count here, summed over ranks later
            outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
            loss = F.cross_entropy(outputs, labels, reduction="sum") / point.count
            loss.backward()
            buckets.end_pass()
            loss_sum += (loss.detach().double() * 2.0**LOSS_BITS).round_() * 2.0**-LOSS_BITS
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
        handle = self.engine.start_sum(control, "control")
        finite = buckets.finish()
        self.engine.wait(handle)
        sums = torch.cat([control, finite.double()[None]]).tolist()
        exposed_comm_s = time.perf_counter() - before
        ok = bool(sums[-1]) and sums[BAD_RANKS] == 0
        if ok:
            replica.optimizer.step(point.lr, point.momentum)
            replica.running.update(buckets.statistics)
        return Outcome(
            loss=sums[LOSS],
            count=round(sums[COUNT]),
            finite=ok,
            bad_ranks=round(sums[BAD_RANKS]),
            bad_rank=round(sums[BAD_RANK_SUM]),
            stop=sums[STOP] > 0,
            checkpoint=sums[CHECKPOINT] > 0,
            data_wait_s=data_wait_s,
            exposed_comm_s=exposed_comm_s,
        )
