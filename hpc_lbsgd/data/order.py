"""One global shuffle an epoch (Goyal et al. 2017, Remark 4), as a function without state.

A permutation of N samples is a keyed bijection evaluated where it is asked for: O(1) memory at any N, and
every rank can compute any worker's samples of any step. Ranks, resumes and world sizes cannot change it.
numpy and the standard library only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache

import numpy as np

from hpc_lbsgd.theory.schedule import Point, Schedule

# Up to this N the whole shuffle is sorted at once (half a MB): exactly uniform where a small domain would
# make a Feistel network's statistics visible. Above it, single positions are computed.
SORTED_UP_TO = 2**16
ROUNDS = 6
LOOKED_AHEAD = 8  # epochs in which a sample's next use is looked for

_MIX1 = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's multipliers
_MIX2 = np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(*parts: int | str) -> int:
    """A 64-bit key for one use of randomness, from what it depends on (seed, purpose, epoch ...)."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a bijection of uint64 in which each input bit moves every output bit."""
    x = x ^ (x >> np.uint64(30))
    x *= _MIX1
    x ^= x >> np.uint64(27)
    x *= _MIX2
    x ^= x >> np.uint64(31)
    return x


def hash_uniforms(key: int, index: np.ndarray, draws: int) -> np.ndarray:
    """(len(index), draws) float64 in [0, 1): the same numbers for an index whatever else is asked for."""
    with np.errstate(over="ignore"):
        base = mix64(np.asarray(index, np.uint64) * _GOLDEN + np.uint64(key))
        counters = (np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN)[None, :]
        return (mix64(base[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Permutation:
    """A random permutation of range(n) for (seed, epoch). Index it with a slice or an integer array.

    n <= 65,536: the argsort of keyed 64-bit hashes, a uniform shuffle. Above: a Feistel network over
    an a x b grid with a*b just above n, walking on where it lands outside (so that it is a bijection of range(n)).
    """

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        self._table = None
        with np.errstate(over="ignore"):
            if n <= SORTED_UP_TO:
                hashes = mix64(np.arange(n, dtype=np.uint64) * _GOLDEN + np.uint64(stream_key("order", seed, epoch)))
                self._table = np.argsort(hashes, kind="stable")
            else:
                self._a = math.isqrt(n - 1) + 1
                self._b = -(-n // self._a)
                self._keys = [np.uint64(stream_key("order", seed, epoch, r)) for r in range(ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: slice | np.ndarray) -> np.ndarray:
        """Samples (int64) at these positions of the epoch's order; positions must lie in [0, n)."""
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(self.n))
        if self._table is not None:
            return self._table[positions]
        x = np.asarray(positions, np.uint64)
        with np.errstate(over="ignore"):
            x = self._network(x)
            outside = np.flatnonzero(x >= self.n)
            while outside.size:  # a*b - n < a of n*(1+1/a) places: rare, and it ends, for the walk is a cycle
                x[outside] = self._network(x[outside])
                outside = outside[x[outside] >= self.n]
        return x.astype(np.int64)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """Where these samples are in the epoch's order (int64): the inverse."""
        if self._inverse is not None:
            found: np.ndarray = self._inverse[samples]
            return found
        x = np.asarray(samples, np.uint64)
        with np.errstate(over="ignore"):
            x = self._network(x, back=True)
            outside = np.flatnonzero(x >= self.n)
            while outside.size:  # the same walk, backwards
                x[outside] = self._network(x[outside], back=True)
                outside = outside[x[outside] >= self.n]
        return x.astype(np.int64)

    @cached_property
    def _inverse(self) -> np.ndarray | None:
        return None if self._table is None else np.argsort(self._table)

    def _network(self, x: np.ndarray, back: bool = False) -> np.ndarray:
        """Alternating unbalanced Feistel network on (left < a, right < b); all additions are modulo the half. back: the
        inverse, rounds and additions undone."""
        left, right = np.divmod(x, np.uint64(self._b))
        halves, sizes = [left, right], (self._a, self._b)
        work = np.empty_like(left)
        rounds = list(enumerate(self._keys))
        for i, key in reversed(rounds) if back else rounds:
            target, source = halves[i % 2], halves[1 - i % 2]
            size = np.uint64(sizes[i % 2])
            # work = high bits of a keyed mix of `source`, scaled to [0, size) without a division
            np.add(source, key, out=work)
            work *= _MIX1
            work ^= work >> np.uint64(32)
            work *= _MIX2
            work >>= np.uint64(32)
            work *= size
            work >>= np.uint64(32)
            if back:
                target -= work
                np.minimum(target, target + size, out=target)  # unsigned: wraps to huge below 0
            else:
                target += work
                np.minimum(target, target - size, out=target)  # unsigned: wraps to huge below `size`
        return left * np.uint64(self._b) + right


class NextUse:
    """When samples are needed next by some of the ranks, such as those of a node: known without asking, for the order
    is a function.

    schedule: as it is decided up to now. here: (ranks,) bool, which of them count.
    """

    def __init__(self, schedule: Schedule, seed: int, here: np.ndarray):
        self.schedule, self.here = schedule, here
        self.permutation = lru_cache(LOOKED_AHEAD + 1)(lambda epoch: Permutation(schedule.samples, seed, epoch))

    def __call__(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """After `epoch`, (len(samples),) float64: 3.25 is a quarter through epoch 3. Those that are not needed in the
        next LOOKED_AHEAD epochs come later than all others, or never (infinity) where the run is over by then."""
        last = min(epoch + LOOKED_AHEAD, self.schedule.epochs - 1)
        found = np.full(len(samples), np.inf if last == self.schedule.epochs - 1 else last + 1.5)
        open_ = np.arange(len(samples))
        for after in range(epoch + 1, last + 1):
            position = self.permutation(after).positions(samples[open_])
            mine = self._mine(after, position)
            found[open_[mine]] = after + position[mine] / self.schedule.samples
            open_ = open_[~mine]
            if not len(open_):
                break
        return found

    def _mine(self, epoch: int, position: np.ndarray) -> np.ndarray:
        """Whether what is at these positions of an epoch is needed by the ranks that count."""
        schedule, n = self.schedule, self.schedule.samples_per_worker
        kn = schedule.stages[schedule.stage_of_epoch(epoch)].workers * n
        mine: np.ndarray = self.here[position % kn // n % len(self.here)]
        return mine & (position < schedule.steps_in_epoch(epoch) * kn)


def worker_samples(permutation: Permutation, point: Point, worker: int) -> np.ndarray:
    """Samples of worker j at one step: perm[start + j*n : start + (j+1)*n], clipped to the data (DESIGN, "Samples").

    point: a `theory.schedule.Point`. Shape (0..n,), int64.
    """
    return permutation[slice(*point.worker_range(worker))]


def workers_of_rank(workers: int, rank: int, size: int) -> range:
    """Worker j runs on rank j mod size; a rank may have none."""
    return range(rank, workers, size)


def passes_of_rank(workers: int, rank: int, size: int, workers_per_pass: int) -> list[range]:
    """The workers of one rank at one step, cut into forward-backward passes."""
    mine = workers_of_rank(workers, rank, size)
    return [mine[i : i + workers_per_pass] for i in range(0, len(mine), workers_per_pass)]


def samples_in_order(
    schedule: Schedule, seed: int, steps: range, passes: Callable[[Point], Iterable[Sequence[int]]]
) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, samples) of each pass of `steps`, one after another. passes: a step's, each with its workers."""
    permutation, epoch = None, None
    for step in steps:
        point = schedule.at(step)
        if permutation is None or point.epoch != epoch:
            epoch = point.epoch
            permutation = Permutation(schedule.samples, seed, epoch)
        for workers in passes(point):
            yield epoch, np.concatenate([worker_samples(permutation, point, j) for j in workers])
