"""A node's copies of samples that lie elsewhere, up to a bound, for the epochs to come (`machine.stage_dir`).

FOLDER/<user number>-<16 digits of the set>-samples/    the user's alone
    <sample // 1000>/<sample>.<file of it>    its bytes; whole as soon as it is there
    in-use                                    held by each rank of a job
    being-fetched                             a lock a sample: of two ranks that want one, one fetches it

Who is to make room is decided by Belady's rule (1966): the copy that is needed last. When a sample is needed again is
a function of seed and step (order.NextUse), so each rank knows it of the copies that it made, whichever rank of the
node will read them, and nothing is said between ranks. All copies are checked when they are read.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.reach import tell
from hpc_lbsgd.data.stage import KEY
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.private import make_private

Key = tuple[int, int]  # sample, number of its file
PER_FOLDER = 1000
BLOCK = 4096  # a file takes whole ones
SUFFIX = "-samples"
NEVER = float("inf")
IN_TURN = 1 << 40  # beyond all epochs
FREE = 0.9  # share of what is free that is taken where nobody says how much
TIDIED = 1000  # entries of a heap that are no longer so, from which on it is made anew
FLOCK = struct.Struct("hhqqi4x")  # fcntl(2): type, whence, start, length, process
ABANDONED_S = 600  # since something half-written was written to


class Kept:
    """One rank's part of them. `next_use(epoch, samples)`: when each is needed on this node after `epoch`, in epochs,
    (len(samples),) float64; settled by who knows the schedule.

    room_bytes: of this rank. Copies that are there belong to the ranks of a node in turn. Raises RunError for a folder
    of another user's; where nothing can be written any more, it keeps no more.
    """

    def __init__(self, folder: Path, room_bytes: float, rank: int, ranks: int):
        make_private(folder, KEY)
        self.folder, self.room_bytes, self.used = folder, room_bytes, 0
        self.next_use: Callable[[int, np.ndarray], np.ndarray] = lambda epoch, samples: np.full(len(samples), NEVER)
        self._lock, self.epoch, self._writes = threading.Lock(), 0, True
        self._copies: dict[Key, tuple[float, int]] = {}  # of this rank: when it is needed, bytes on the disk
        self._last: list[tuple[float, Key]] = []  # heaps of both, with what is no longer so among it
        self._first: list[tuple[float, Key]] = []
        self._in_use = os.open(folder / "in-use", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._in_use, fcntl.LOCK_SH)
        self._fetched = os.open(folder / "being-fetched", os.O_RDWR | os.O_CREAT, 0o600)
        self._find(rank, ranks)

    def _find(self, rank: int, ranks: int) -> None:
        for place in (e for e in os.scandir(self.folder) if e.is_dir()):
            for entry in os.scandir(place):
                sample, _, number = entry.name.partition(".")
                with contextlib.suppress(FileNotFoundError):
                    there = entry.stat()
                    if not sample and time.time() > there.st_mtime + ABANDONED_S:
                        os.unlink(entry)
                    elif sample.isdecimal() and number.isdecimal() and int(sample) % ranks == rank:
                        self._add((int(sample), int(number)), on_disk(there.st_size), NEVER)

    def foresee(self, next_use: Callable[[int, np.ndarray], np.ndarray], epoch: int) -> None:
        """Say when samples are needed, from this epoch on: what is there was found before anyone knew."""
        with self._lock:
            self.next_use, self.epoch = next_use, epoch
            self._settle(list(self._copies), epoch - 1)
            self._make_room(0, -1.0)  # there may be less than before

    def advance(self, now: float) -> None:
        """So many epochs are over: copies that were needed since are needed again later."""
        with self._lock:
            self.epoch, passed = max(self.epoch, int(now)), {}
            while self._first and self._first[0][0] <= now:
                needed, key = heapq.heappop(self._first)
                if self._copies.get(key, (None,))[0] == needed:
                    passed.setdefault(int(needed), []).append(key)
            for epoch, keys in passed.items():
                self._settle(keys, epoch)

    def _settle(self, keys: list[Key], epoch: int) -> None:
        """When these copies are needed after `epoch`."""
        times = self.next_use(epoch, np.array([sample for sample, _ in keys], np.int64)).tolist() if keys else []
        for key, needed in zip(keys, times, strict=True):
            self._add(key, self._copies[key][1], needed, False)

    def read(self, key: Key) -> bytes | None:
        try:
            return self._path(key).read_bytes()
        except FileNotFoundError:
            with self._lock:
                if key in self._copies and not self._path(key).exists():  # another job, or who cleans up, removed it
                    self._drop(key)
        except OSError:
            pass
        return None

    def drop(self, key: Key) -> None:
        with self._lock:
            self._drop(key)

    def keep(self, key: Key, content: bytes | memoryview, needed: float) -> None:
        """Keep a copy that is needed then, where there is room, or one that is needed later."""
        with self._lock:
            if not self._writes or key in self._copies:
                return
            size = on_disk(len(content))
            if not self._make_room(size, needed) or not self._writes:
                return
            try:
                self._write(key, content)
                self._add(key, size, needed)
            except OSError as problem:
                self._keep_no_more(problem)

    def _keep_no_more(self, problem: OSError) -> None:
        self._writes = False
        tell(f"{KEY}: {self.folder}: {problem.strerror or problem}; no more samples are kept there")

    def _make_room(self, size: int, needed: float) -> bool:
        """For so many bytes that are needed then; False where all else is needed sooner."""
        while self.used + size > self.room_bytes:
            last = self._needed_last()
            if last is None or self._copies[last][0] <= needed:
                return False
            self._drop(last)
        return True

    @contextlib.contextmanager
    def alone(self, samples: Sequence[int]) -> Iterator[None]:
        """While no other rank of this node fetches one of these samples. In order, so that no two wait for each
        other; a thread of this rank is not kept out."""
        held = sorted(set(samples))
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                for sample in held:
                    self._lock_byte(fcntl.F_WRLCK, sample)
            yield
        finally:
            with contextlib.suppress(OSError):
                for sample in held:
                    self._lock_byte(fcntl.F_UNLCK, sample)

    def _lock_byte(self, kind: int, at: int) -> None:
        """Of the open file, not of the process: among locks of processes the system looks for circles, and sees some
        that are none where threads wait in order."""
        fcntl.fcntl(self._fetched, fcntl.F_OFD_SETLKW, FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))

    def _path(self, key: Key) -> Path:
        return self.folder / str(key[0] // PER_FOLDER) / f"{key[0]}.{key[1]}"

    def _write(self, key: Key, content: bytes | memoryview) -> None:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _add(self, key: Key, size: int, needed: float, new: bool = True) -> None:
        self._copies[key] = (needed, size)
        self.used += size if new else 0
        heapq.heappush(self._last, (-needed, key))
        if needed < NEVER:
            heapq.heappush(self._first, (needed, key))
        known = self._copies.items()
        if len(self._last) > 2 * len(known) + TIDIED:
            self._last = [(-time, key) for key, (time, _) in known]
            heapq.heapify(self._last)
        if len(self._first) > 2 * len(known) + TIDIED:
            self._first = [(time, key) for key, (time, _) in known if time < NEVER]
            heapq.heapify(self._first)

    def _needed_last(self) -> Key | None:
        while self._last:
            needed, key = self._last[0]
            if self._copies.get(key, (None,))[0] == -needed:
                return key
            heapq.heappop(self._last)
        return None

    def _drop(self, key: Key) -> None:
        self.used -= self._copies.pop(key, (0.0, 0))[1]
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as problem:
            self._keep_no_more(problem)

    def __del__(self):
        for descriptor in (getattr(self, "_in_use", None), getattr(self, "_fetched", None)):
            if descriptor is not None:
                os.close(descriptor)


def on_disk(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# ---------------------------------------------------------------- the sets of a run


def in_part(sets: Sequence[Manifest | object], stage_gb: float | None) -> list[bool]:
    """Of which of these sets samples are kept. Others are staged, where they can be: all of them within the bound, or
    none."""
    packed = [isinstance(s, Manifest) and bool(s.shards) for s in sets]
    total = sum(size_of(s) for s, shards in zip(sets, packed, strict=True) if shards)
    whole = stage_gb is None or total <= stage_gb * 1e9
    return [shards and (s.remote or not whole) for s, shards in zip(sets, packed, strict=True)]


def left(sets: Sequence[Manifest | object], stage_gb: float | None) -> float | None:
    """What is left of the bound beside sets that are staged."""
    if stage_gb is None:
        return None
    parts = zip(sets, in_part(sets, stage_gb), strict=True)
    return stage_gb - sum(size_of(s) for s, part in parts if isinstance(s, Manifest) and not part) / 1e9


def size_of(manifest: Manifest) -> int:
    return sum(shard["bytes"] for shard in manifest.shards)


def folder_of(manifest: Manifest, top: Path) -> Path:
    return top / f"{os.geteuid()}-{manifest.fingerprint[:16]}{SUFFIX}"


def begin(sets: Sequence[Manifest], top: Path, stage_gb: float | None, rank: int, ranks: int) -> None:
    """Keep samples of these sets from now on; rank: of so many on this node. Sets have room by their size."""
    total = sum(map(size_of, sets))
    for manifest in sets:
        folder = folder_of(manifest, top)
        share = size_of(manifest) / total / ranks
        try:
            make_private(folder, KEY)
            free = FREE * shutil.disk_usage(folder).free
            manifest.kept = Kept(folder, (stage_gb * 1e9 if stage_gb is not None else free) * share, rank, ranks)
        except OSError as problem:
            raise RunError(f"{KEY}: cannot write {folder}: {problem.strerror or problem}") from None
        if stage_gb is None:
            manifest.kept.room_bytes += manifest.kept.used


def sweep(top: Path, sets: Sequence[Manifest]) -> None:
    """Remove this user's copies of other sets, which no job uses: the bound is of all."""
    wanted = {folder_of(manifest, top) for manifest in sets}
    for folder in top.glob(f"{os.geteuid()}-*{SUFFIX}"):
        if folder in wanted or folder.is_symlink():
            continue
        with contextlib.suppress(OSError), open(folder / "in-use", "r+b") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
