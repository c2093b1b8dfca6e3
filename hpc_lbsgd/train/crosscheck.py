"""Cross-check: under any-ranks, ranks watch one another for silently wrong hardware.

Every `machine.cross_check_steps` steps each rank sends a digest of its weights and buffers: replicas that parted are
found. And one worker is computed a second time, by a rank on another node: equal bits, or one of them computes wrongly.
Digests travel in the control vector as 32-bit halves in slots of their own, which a float64 sum keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hpc_lbsgd.parallel.scales import halves

PASSING = "; computed again it was right"
_MIX = 0x9E3779B97F4A7C15 - 2**64  # odd


class Pair(NamedTuple):
    """A worker of one step that two ranks compute (one rank twice, where there is no other)."""

    worker: int
    owner: int
    checker: int


class Mismatch(NamedTuple):
    """What every rank knows of a cross-check that failed."""

    weights: list[int]  # digest by rank
    pair: Pair
    owner: int  # digests of the worker
    checker: int

    @property
    def parted(self) -> list[int]:
        """Ranks whose weights are not those of most; all, where no weights are those of most."""
        common, count = Counter(self.weights).most_common(1)[0]
        agreed = 2 * count > len(self.weights)
        return [rank for rank, digest in enumerate(self.weights) if digest != common or not agreed]


def checkers(hosts: Sequence[str]) -> list[int]:
    """For each rank the next one on another host; the next one where there is one host."""
    size = len(hosts)

    def of(rank: int) -> int:
        others = [(rank + i) % size for i in range(1, size)]
        return next((r for r in others if hosts[r] != hosts[rank]), others[0] if others else rank)

    return [of(rank) for rank in range(size)]


def pair_at(point, every: int, partners: Sequence[int]) -> Pair | None:
    """Which worker is computed twice at this step, if one is; each in its turn. Pure."""
    if not every or point.step % every:
        return None
    busy = -(-point.count // point.samples_per_worker)
    worker = point.step // every % busy
    owner = worker % len(partners)
    return Pair(worker, owner, partners[owner])


# ---------------------------------------------------------------- digests


def digest(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """An int64 scalar on the device that follows from every bit of the tensors and its place."""
    return mixed(_digest(tensor) for tensor in tensors if tensor.numel())


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    content = tensor.contiguous().view(-1).view(torch.uint8)
    if len(content) % 8:
        content = F.pad(content, (0, -len(content) % 8))
    words = content.view(torch.int64)
    # each word is mixed with its place before they are added: a sum of products would let changes cancel
    words = words + torch.arange(len(words), device=words.device).mul_(_MIX)
    for shift in (29, 32):
        words = (words ^ (words >> shift & (1 << 64 - shift) - 1)) * _MIX
    return (words ^ (words >> 31 & (1 << 33) - 1)).sum()


def mixed(digests: Iterable[torch.Tensor]) -> torch.Tensor:
    """One digest of several, in their order."""
    total = None
    for found in digests:
        total = found if total is None else total * _MIX + found
    return total


def number(value: torch.Tensor) -> int:
    """An int64 scalar as `whole` gives it back: not negative, or the same digest would be two."""
    return int(value) % 2**64


def whole(high: float, low: float) -> int:
    return int(high) << 32 | int(low)


class Slots:
    """Where digests lie in the tail of a control vector: two halves a rank, then owner's and checker's."""

    def __init__(self, size: int):
        self.size, self.length = size, 2 * size + 4

    def write(self, tail: torch.Tensor, rank: int, weights: torch.Tensor) -> None:
        tail[2 * rank : 2 * rank + 2] = halves(weights)

    def write_worker(self, tail: torch.Tensor, checking: bool, worker: torch.Tensor) -> None:
        start = 2 * self.size + 2 * checking
        tail[start : start + 2] = halves(worker)

    def read(self, sums: Sequence[float], pair: Pair) -> Mismatch | None:
        """What differs, if anything does."""
        values = [whole(*sums[i : i + 2]) for i in range(0, self.length, 2)]
        *weights, owner, checker = values
        if len(set(weights)) == 1 and owner == checker:
            return None
        return Mismatch(weights, pair, owner, checker)


# ---------------------------------------------------------------- who it was


def culprit(mismatch: Mismatch, again: dict[int, int], name: Callable[[int], str]) -> str:
    """One sentence that names the rank. again: digests of the worker computed once more, by rank: the two, and a third
    where there is one."""
    pair = mismatch.pair
    if mismatch.parted:
        named = ", ".join(name(r) for r in mismatch.parted[:4])
        if len(mismatch.parted) == len(mismatch.weights):
            return f"weights or buffers differ between {named}"
        return f"weights or buffers of {named} are not those of most ranks: memory or a sum went wrong there"
    votes = Counter([mismatch.owner, mismatch.checker, *again.values()])
    (right, count), *rest = votes.most_common()
    tied = rest and rest[0][1] == count
    first = {pair.owner: mismatch.owner, pair.checker: mismatch.checker}
    if pair.owner == pair.checker:
        return f"{name(pair.owner)} computed worker {pair.worker} twice to different bits"
    wrong = [rank for rank, found in first.items() if found != right]
    if tied or len(wrong) != 1:
        return f"{name(pair.owner)} and {name(pair.checker)} compute worker {pair.worker} to different bits"
    (rank,) = wrong
    once = PASSING if again.get(rank) == right else "; computed again it was wrong again"
    return f"{name(rank)} computed worker {pair.worker} to other bits than {count} computations elsewhere{once}"
