"""Whose samples come when: one global shuffle an epoch, for any PyTorch DataLoader, and its steps of parts."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from hpc_lbsgd.api.keyed import Keyed, Sample, draws
from hpc_lbsgd.api.world import begun
from hpc_lbsgd.data.order import samples_in_order, workers_of_rank
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.theory.schedule import Point, Schedule


@dataclass(frozen=True)
class Part:
    """One worker's samples of one step, on this rank's device."""

    step: Step
    worker: int
    count: int  # samples: n, or fewer in the last worker of a tail
    last: bool  # of this rank, in this step
    batch: Any  # as the loader gave it

    @property
    def inputs(self) -> Any:
        """The first of the loader's (inputs, labels)."""
        return self._pair()[0]

    @property
    def labels(self) -> Any:
        """The second of them."""
        return self._pair()[1]

    def _pair(self) -> Sequence[Any]:
        if isinstance(self.batch, (tuple, list)) and len(self.batch) == 2:
            return self.batch
        raise RequestError("part.inputs, part.labels: the loader's batches are no pairs; use part.batch")


class Step:
    """One step of all ranks: its place in the schedule, and this rank's parts of it."""

    def __init__(self, point: Point, mine: Sequence[int], batches: Iterator[Any], shuffle: GlobalShuffle):
        self.point, self.mine, self.shuffle = point, mine, shuffle
        self.workers = self._parts(batches, shuffle.device)
        """This rank's parts, in order; none where it has no worker at this step."""
        self.taken = 0
        # runs that have; a script may have several, as for a GAN
        self.begun: set[object] = set()
        self.reduced: set[object] = set()

    @property
    def step(self) -> int:
        """Its number, from 0."""
        return self.point.step

    @property
    def epoch(self) -> int:
        return self.point.epoch

    @property
    def lr(self) -> float:
        return self.point.lr

    def _parts(self, batches: Iterator[Any], device: torch.device) -> Iterator[Part]:
        for worker in self.mine:
            try:
                batch = on(device, next(batches))
            except StopIteration:
                raise RunError(f"step {self.step}: the loader ended before worker {worker}'s samples") from None
            start, stop = self.point.worker_range(worker)
            found = lengths(batch)
            if found and stop - start not in found:
                raise RunError(
                    f"step {self.step}: the loader gave {' or '.join(map(str, sorted(found)))} samples for worker "
                    f"{worker}, which has {stop - start}: its data set or its collate_fn leaves some out, or adds to "
                    "them"
                )
            self.taken += 1
            yield Part(self, worker, stop - start, self.taken == len(self.mine), batch)


class GlobalShuffle(Sampler[list[Sample]]):
    """A batch sampler: the samples of this rank's workers, one list a worker, in order, from step `start` to the end.

        loader = DataLoader(dataset, batch_sampler=lb.GlobalShuffle(dataset, schedule, seed=0), num_workers=4)

    Every epoch is one permutation of all samples (Goyal et al. 2017, Remark 4), a function of (seed, epoch): neither
    the number of ranks nor a resume changes who is in a global batch. data: the data set, or how many samples it has;
    the schedule's own N. rank, size: by default those of `lb.init`; one rank alone where it was not called.
    """

    def __init__(
        self,
        data: Sized | SupportsIndex,
        schedule: Schedule,
        seed: int = 0,
        start: int = 0,
        rank: int | None = None,
        size: int | None = None,
    ):
        try:
            samples = operator.index(data) if isinstance(data, SupportsIndex) else len(data)
        except TypeError:
            raise RequestError(
                f"lb.GlobalShuffle: {type(data).__name__} has no length; samples are asked for by number, from a data "
                "set with __len__ and __getitem__"
            ) from None
        if samples != schedule.samples:
            raise RequestError(f"lb.GlobalShuffle: {samples} samples, and a schedule of {schedule.samples}")
        if not 0 <= start <= schedule.steps:
            raise RequestError(f"lb.GlobalShuffle(start={start}): the schedule has {schedule.steps} steps")
        world = begun()
        self.rank = rank if rank is not None else world.rank if world else 0
        self.size = size if size is not None else world.size if world else 1
        if not 0 <= self.rank < self.size:
            raise RequestError(f"lb.GlobalShuffle(rank={self.rank}, size={self.size}): ranks count from 0 to size - 1")
        self.device = world.device if world else torch.device("cpu")
        self.schedule, self.seed, self.start = schedule, seed, start
        self._through = False  # by a loop, to its end

    def workers_at(self, point: Point) -> range:
        """This rank's workers that have samples at a step."""
        return workers_of_rank(-(-point.count // point.samples_per_worker), self.rank, self.size)

    def __iter__(self) -> Iterator[list[Sample]]:
        for epoch, samples in self.passes():
            yield [Sample(i, epoch) for i in samples.tolist()]

    def passes(self) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, samples) of each of this rank's parts, from `start` to the end."""
        steps = range(self.start, self.schedule.steps)
        return samples_in_order(self.schedule, self.seed, steps, lambda point: [[j] for j in self.workers_at(point)])

    def __len__(self) -> int:
        """This rank's parts from `start` to the end."""
        return sum(len(self.workers_at(self.schedule.at(s))) for s in range(self.start, self.schedule.steps))

    def steps(self, loader: DataLoader[Any]) -> Iterator[Step]:
        """Every step from `start` to the end, whether this rank has workers in it or not: ranks sum at each."""
        sampler: object = getattr(loader, "batch_sampler", None)
        if sampler is not self:
            raise RequestError("shuffle.steps(loader): make the loader with batch_sampler=shuffle, this one")
        self._look_at(loader)
        return self.parted(iter(loader))

    def _look_at(self, loader: DataLoader[Any]) -> None:
        """Refuse an `lb.Keyed` that is not told the epoch, and warn of draws that would follow the ranks. By a first
        sample, where this process makes them: files that a data set opens here must not be those of its processes."""
        Keyed.asked_plainly, data, drawn = False, loader.dataset, False
        inside, world = wrapped_keyed(data), begun()
        if loader.num_workers == 0 and self.start < self.schedule.steps:
            drawn = draws(data, Sample(0, self.schedule.at(self.start).epoch))
            inside = inside or (type(data).__name__ if Keyed.asked_plainly else None)
        if inside:
            raise RequestError(
                f"lb.Keyed is inside of {inside}, which hands plain numbers on, without their epoch: each epoch would "
                f"draw the same. Put it around: lb.Keyed({inside}(...))"
            )
        if drawn and world and world.determinism == "any-ranks" and world.rank == 0:
            warnings.warn(
                f"{type(data).__name__} draws from a global generator where it makes a sample: what it draws depends "
                "on the process that makes it, and the result on the number of ranks. lb.Keyed(dataset) keys it by "
                "sample and epoch",
                stacklevel=3,
            )

    def parted(self, batches: Iterator[Any]) -> Iterator[Step]:
        """The steps of batches that were made in this order, one a part."""
        if self._through and self.rank == 0:
            warnings.warn(
                f"this shuffle has been gone through: its steps are all {self.schedule.epochs} epochs of the schedule, "
                "and begin again now. No loop of epochs is around them",
                stacklevel=2,
            )
        for number in range(self.start, self.schedule.steps):
            point = self.schedule.at(number)
            step = Step(point, self.workers_at(point), batches, self)
            yield step
            if step.begun - step.reduced:
                raise RunError(f"step {number} ended, and was not reduced: run.reduce(step) after its parts")
            if step.taken < len(step.mine):
                raise RunError(
                    f"step {number}: {step.taken} of this rank's {len(step.mine)} parts were taken: go through "
                    "step.workers to its end"
                )
        self._through = True


def wrapped_keyed(dataset: Any) -> str | None:
    """The data set that has an `lb.Keyed` in it, by its class."""
    inner = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    if not isinstance(dataset, Keyed) and any(isinstance(d, Keyed) or wrapped_keyed(d) for d in inner if d is not None):
        return type(dataset).__name__
    return None


def on(device: torch.device, batch: Any) -> Any:
    """A batch with its tensors on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping) and not hasattr(batch, "to"):
        return {key: on(device, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [on(device, value) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch.to(device) if callable(getattr(batch, "to", None)) else batch  # graphs, encodings of texts


def lengths(batch: Any) -> set[int]:
    """Of all tensors and lists of a batch: one of them is the number of its samples. Of lists of images, of texts or
    graphs laid end to end, others are not."""
    if isinstance(batch, torch.Tensor):
        return {len(batch)} if batch.dim() else set()
    if isinstance(batch, Mapping):
        return set().union(*map(lengths, batch.values()))
    if isinstance(batch, (tuple, list)):
        within = set().union(*map(lengths, batch))
        pair = len(batch) == 2 and all(isinstance(b, torch.Tensor) for b in batch)
        return within if pair else within | {len(batch)}
    return set()
