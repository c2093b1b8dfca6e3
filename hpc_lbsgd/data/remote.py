"""Samples of a packed set that lies elsewhere, read by ranges: what will be asked for is fetched ahead of time, in many
threads, what lies together in one piece. Every sample is checked by its checksum.

A global shuffle asks for samples of all shards at once, so whole shards would be fetched again and again: what is
fetched, and kept on the node (kept.py), is a sample.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from hpc_lbsgd.data.elsewhere import reach
from hpc_lbsgd.data.kept import Kept, Key
from hpc_lbsgd.data.manifest import Manifest, checksum
from hpc_lbsgd.data.packed import ChangedError, Packed, SampleError
from hpc_lbsgd.data.reach import Missing, Wrong, patiently
from hpc_lbsgd.errors import RunError

FETCHERS = 16  # requests under way at a time; they wait for the network
GAP = 1 << 14  # bytes between two samples that are read rather than asked for apart
TOGETHER = 1 << 22  # bytes of a request that several samples share


class Piece(NamedTuple):
    """One file of a sample: bytes start to stop of a shard."""

    shard: int
    start: int
    stop: int
    key: Key


@dataclass
class Expected:
    """A piece that will be asked for so many times."""

    bytes: int
    times: int = 1
    future: Future = field(default_factory=Future)  # of all that is asked for with it


def runs(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """What is asked for together: pieces that lie near each other. Those that are needed first come first."""
    order = {piece.key: i for i, piece in enumerate(pieces)}
    found: list[list[Piece]] = []
    for piece in sorted(pieces):
        last = found[-1] if found else None
        near = last and last[-1].shard == piece.shard and piece.start - last[-1].stop <= GAP
        if near and piece.stop - last[0].start <= TOGETHER:
            last.append(piece)
        else:
            found.append([piece])
    return sorted(found, key=lambda run: min(order[piece.key] for piece in run))


def serve(work: SimpleQueue) -> None:
    """A thread's life. Nothing of a set is held while it waits: who reads it may go."""
    while (item := work.get()) is not None:
        future, function, *arguments = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as problem:
                future.set_exception(problem)
        del item, future, function, arguments


class Remote(Packed):
    """Of a manifest whose root is an address, or whose samples are kept on the node one by one."""

    def __init__(self, manifest: Manifest):
        self._threads: list[threading.Thread] = []
        super().__init__(manifest)
        self.kept: Kept | None = manifest.kept
        self.reach = reach(manifest.root if manifest.remote else f"file://{manifest.root}")
        self.names: list[str | None] = [None, *sorted(manifest.files)]  # by the number in a key
        self.outstanding = 0  # bytes that are expected, and not asked for yet
        self._expected: dict[Key, Expected] = {}
        self._given_up: set[int] = set()
        self._lock, self._work = threading.Lock(), SimpleQueue()

    # ------------------------------------------------------------ ahead of time

    def pieces(self, samples: Iterable[int], names: Sequence[str | None]) -> list[Piece]:
        """The files of these names (None: the image) of each sample."""
        found = []
        for sample in samples:
            for name in names:
                shard, start, size = self.place(sample, name)
                found.append(Piece(shard, start, start + size, (sample, self.names.index(name))))
        return found

    def expect(self, pieces: Sequence[Piece], epoch: int) -> None:
        """Fetch these ahead of time. `content` will be asked for each as often as it is among them."""
        new, needed = {}, self._needed(epoch, pieces)
        with self._lock:
            for piece in pieces:
                if piece.key in self._expected:
                    self._expected[piece.key].times += 1
                    continue
                if piece.key[0] in self._given_up:
                    continue
                self._expected[piece.key] = Expected(piece.stop - piece.start)
                self.outstanding += piece.stop - piece.start
                new[piece.key] = piece
            for run in runs(list(new.values())):
                future: Future = Future()
                for piece in run:
                    self._expected[piece.key].future = future
                self._work.put((future, self._fetched, run, needed))
        if not self._threads:
            # daemons: a process that ends does not wait for a store that hangs
            self._threads = [threading.Thread(target=serve, args=(self._work,), daemon=True) for _ in range(FETCHERS)]
            for thread in self._threads:
                thread.start()

    def give_up(self, sample: int) -> None:
        """Others stand in for this sample from now on: it is not going to be asked for again."""
        with self._lock:
            self._given_up.add(sample)
            for key in [key for key in self._expected if key[0] == sample]:
                self.outstanding -= self._expected.pop(key).bytes

    def forget(self) -> None:
        """What was expected is not going to be asked for."""
        with self._lock:
            for expected in self._expected.values():
                expected.future.cancel()
            self._expected, self.outstanding = {}, 0

    def reached(self, epoch: int, samples: np.ndarray) -> None:
        """The loader has come to these samples: what is kept for later may be judged anew."""
        if self.kept:
            now = float(self.kept.next_use(epoch - 1, samples[:1])[0])
            if epoch <= now < epoch + 1:
                self.kept.advance(now)

    def __del__(self):
        for _ in self._threads:
            self._work.put(None)

    # ------------------------------------------------------------ now

    def content(self, sample: int, name: str | None = None) -> np.ndarray:
        key = (sample, self.names.index(name))
        with self._lock:
            expected = self._expected.get(key)
            if expected:
                expected.times -= 1
                if not expected.times:
                    self.outstanding -= expected.bytes
                    del self._expected[key]
        if expected:
            found = expected.future.result()[key]
        else:
            pieces = self.pieces([sample], [name])
            found = self._fetched(pieces, self._needed(self.kept.epoch if self.kept else 0, pieces))[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _needed(self, epoch: int, pieces: Sequence[Piece]) -> dict[int, float]:
        """When samples that are asked for in `epoch` are needed once more on this node."""
        if not self.kept:
            return {}
        samples = list(dict.fromkeys(piece.key[0] for piece in pieces))
        return dict(zip(samples, self.kept.next_use(epoch, np.array(samples, np.int64)).tolist(), strict=True))

    def _fetched(self, run: list[Piece], needed: dict[int, float]) -> dict[Key, np.ndarray | Exception]:
        """What each piece of a run is, or why it cannot be had. needed: by sample, once more."""
        found: dict[Key, np.ndarray | Exception] = {}
        with self.kept.alone([piece.key[0] for piece in run]) if self.kept else contextlib.nullcontext():
            for piece in run if self.kept else ():
                copy = self.kept.read(piece.key)
                if copy is not None and self._right(piece, copy):
                    found[piece.key] = np.frombuffer(copy, np.uint8)
                elif copy is not None:
                    self.kept.drop(piece.key)
            for some in runs([piece for piece in run if piece.key not in found]):
                for piece, content in zip(some, self._asked(some), strict=True):
                    found[piece.key] = content
                    if self.kept and not isinstance(content, Exception):
                        self.kept.keep(piece.key, content.data, needed[piece.key[0]])
        return found

    def _asked(self, run: list[Piece]) -> list[np.ndarray | Exception]:
        """By one request. What is wrong in it may be of whoever stands between: that is asked for again, all of it at
        once, for a shard that was replaced has no piece that is right."""
        found: dict[Key, np.ndarray | Exception] = {}
        shard, reasons = run[0].shard, {}

        def ask() -> None:
            rest = [piece for piece in run if piece.key not in found]
            first, stop = rest[0].start, max(piece.stop for piece in rest)
            name = self.manifest.shards[shard]["name"]
            content = self.reach.read(name, first, stop) if stop > first else b""  # no range is of no bytes
            for piece in rest:
                part, size = content[piece.start - first : piece.stop - first], piece.stop - piece.start  # a copy
                if self._right(piece, part):
                    found[piece.key] = np.frombuffer(part, np.uint8)
                else:
                    short = f"{len(part)} bytes of {size}"
                    reasons[piece.key] = "not the bytes that were indexed" if len(part) == size else short
            if len(found) < len(run):
                raise Wrong(next(reasons[piece.key] for piece in rest if piece.key not in found))

        try:
            patiently(ask, self.manifest.shard_place(shard))
        except Missing as problem:
            return [SampleError(piece.key[0], f"cannot read {self._where(piece)}: {problem}") for piece in run]
        except Wrong:
            told = self._changed(shard)
            for piece in run:
                if piece.key not in found:
                    why = f"{self._where(piece)}: {reasons[piece.key]}; {told}"
                    found[piece.key] = ChangedError(piece.key[0], why)
        except RunError as problem:
            return [problem] * len(run)
        return [found[piece.key] for piece in run]

    def _where(self, piece: Piece) -> str:
        return self.manifest.file(piece.key[0], self.names[piece.key[1]])

    def _right(self, piece: Piece, content: bytes) -> bool:
        name = self.names[piece.key[1]]
        known = self.manifest.checksums if name is None else self.manifest.of_file(name, "checksum")
        return len(content) == piece.stop - piece.start and checksum(content) == int(known[piece.key[0]])

    def _changed(self, shard: int) -> str:
        """What is known of a shard whose bytes are not those of the manifest."""
        known = self.manifest.shards[shard]["bytes"]
        try:
            facts = patiently(lambda: self.reach.facts(self.manifest.shards[shard]["name"]), "", ())
        except (Missing, RunError):
            return "it changed since"
        size = "as many bytes" if facts.bytes == known else f"{facts.bytes} bytes, and {known} then"
        return f"the shard changed since it was indexed: it has {size}, version {facts.version or 'unknown'}"
