"""What is random in a sample, as a function of (seed, epoch, sample): not of the process that draws it."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hpc_lbsgd.data.order import stream_key


class Sample(int):
    """A sample's number, which knows the epoch that asks for it."""

    epoch: int

    def __new__(cls, index: int, epoch: int) -> Sample:
        sample = super().__new__(cls, index)
        sample.epoch = epoch
        return sample

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]  # on its way to a loader's process
        return int(self), self.epoch


class Keyed(Dataset[Any]):
    """A data set whose random transforms draw the same for a sample, whichever rank and loader process makes it.

        loader = DataLoader(lb.Keyed(dataset, seed=0), batch_sampler=shuffle, num_workers=4)

    For each sample torch's generator, Python's and numpy's global one are seeded by (seed, epoch, sample). A generator
    that the data set keeps for itself stays its own: it must not have one. Augmentation under any-ranks needs this, or
    to be drawn inside `run.part`.
    """

    asked_plainly = False  # of any, for a sample without its epoch, since this was last set

    def __init__(self, dataset: Any, seed: int = 0):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Sample):
            Keyed.asked_plainly = True
        with drawn_from(stream_key("sample", self.seed, getattr(index, "epoch", 0), int(index))):
            return self.dataset[int(index)]


@contextmanager
def drawn_from(key: int) -> Iterator[None]:
    """The global generators of a process begin at `key` here, and go on afterwards as if nothing had been drawn."""
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def draws(dataset: Any, sample: Sample) -> bool:
    """Whether a sample is made from a global generator as it happens to stand: what it is then depends on who made
    others before it. One that is seeded for the sample does not. False where it cannot be made here."""
    befores, afters = [], []
    for key in (1, 2):
        with drawn_from(key):
            befores.append(generators())
            try:
                dataset[sample]
            except Exception:  # anyone's code; the loader will say it
                return False
            afters.append(generators())
    return any(a != before and a != b for before, a, b in zip(befores[0], *afters, strict=True))


def generators() -> tuple[object, ...]:
    """Where torch's, Python's and numpy's global ones stand."""
    return bytes(torch.get_rng_state().numpy()), random.getstate(), pickle.dumps(np.random.get_state())


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """What is drawn here leaves torch's generators as they were: between parts a script draws what its own seed says,
    the same on all ranks."""
    cpu, on_gpu = torch.get_rng_state(), bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    gpu = torch.cuda.get_rng_state() if on_gpu else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
