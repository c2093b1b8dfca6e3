"""A user's own data set: any object with a length that returns a sample by number.

    def my_data(part):          # "train" or "eval"; named by data.dataset: package.module:my_data
        return MyData(part)     # __len__() and sample(index, rng) -> (input, label); or __getitem__(index)

An input is a tensor, an array, a number or bytes, or several of these by name; so is a label.

Samples are asked for by the same global order as images. What is random must come from `rng`, a numpy Generator keyed
by (seed, epoch, sample), so that it does not depend on ranks. Optional attributes: `classes` (names), `fingerprint`
(a string that changes with the data).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from hpc_lbsgd.data.order import stream_key
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.targets import Inputs, Target, Targets, each, widened
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.imports import load

PREFIX = "user:"  # in place of a manifest's path


class UserSet:
    """A user's data set, with what the trainer asks of a manifest."""

    def __init__(self, name: str, part: str):
        self.name, self.part = name, part
        self.dataset = load(name, "data.dataset")(part)
        self.path = PREFIX + part
        if not hasattr(self.dataset, "__len__") or not (
            hasattr(self.dataset, "sample") or hasattr(self.dataset, "__getitem__")
        ):
            raise RequestError(
                f"data.dataset = {name}: what it returned for {part!r} ({type(self.dataset).__name__}) must have "
                "__len__ and sample(index, rng) or __getitem__(index)"
            )
        self.classes = list(getattr(self.dataset, "classes", []))
        own = getattr(self.dataset, "fingerprint", "")
        self.fingerprint = hashlib.sha256(f"{name} {part} {len(self.dataset)} {own}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, index: int, seed: int, epoch: int) -> tuple[Inputs, Targets]:
        """(input, label) of a sample in an epoch, each of them a tensor or bytes, or several by name."""
        return self.given(index, np.random.default_rng(stream_key("user", seed, epoch, index)))

    def given(self, index: int, rng) -> tuple[Inputs, Targets]:
        """The same, drawn from a generator."""
        found = self.dataset.sample(index, rng) if hasattr(self.dataset, "sample") else self.dataset[index]
        return each(leaf, found[0]), each(leaf, found[1])


def leaf(value: object) -> torch.Tensor | bytes:
    return value if isinstance(value, bytes) else torch.as_tensor(value)


def collected(data: UserSet, seed: int, request: Request) -> Batch:
    """A batch of a user's samples."""
    pairs = [data.sample(int(i), seed, request.epoch) for i in request.samples]
    inputs, labels = zip(*pairs, strict=True)
    return Batch(each(together, *inputs), each(lambda *some: counts(together(*some)), *labels))


def together(*some: torch.Tensor | bytes) -> Target:
    """One row a sample; of bytes a list of uint8 tensors, of a length a sample."""
    if isinstance(some[0], bytes):
        return [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in some]
    return torch.stack(some)


def counts(target: Target) -> Target:
    return target if isinstance(target, list) else widened(target)
