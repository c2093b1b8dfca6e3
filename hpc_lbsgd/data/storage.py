"""Bytes of samples by index: what a loader reads from, wherever the images lie."""

from __future__ import annotations

import os
import resource
import threading
from typing import NamedTuple

import numpy as np

from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.packed import Packed, SampleError
from hpc_lbsgd.data.remote import Remote
from hpc_lbsgd.errors import RequestError

READERS = 4  # threads that read ahead; they wait for the file system, not for the processor
SPARE_FILES = 256  # descriptors left to everything else


class Request(NamedTuple):
    """One batch to be made: samples of one epoch, in order (int64, not empty)."""

    epoch: int
    samples: np.ndarray


class Folder:
    """Image files below a manifest's root."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def read(self, sample: int, name: str | None = None) -> np.ndarray:
        """The encoded image (or another one of that name), uint8 (bytes,)."""
        return self.content(sample, name)

    def content(self, sample: int, name: str | None = None) -> np.ndarray:
        """All bytes of a sample's image, or of its file of that name, uint8 (bytes,)."""
        m = self.manifest
        path, expected = m.file(sample, name), int((m.sizes if name is None else m.of_file(name, "bytes"))[sample])
        try:
            # bare system calls: np.fromfile takes five times as long for a small file
            descriptor = os.open(path, os.O_RDONLY)
            try:
                content = os.read(descriptor, expected + 1)
                while 0 < len(content) < expected and (more := os.read(descriptor, expected + 1 - len(content))):
                    content += more  # network file systems may give a part
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as problem:  # ValueError: no name that a file can have
            raise SampleError(sample, f"cannot read a sample: {problem}. Is the data still there?") from None
        if len(content) != expected:
            raise SampleError(
                sample, f"{path}: {len(content)} bytes or more, {expected} when it was indexed. Index the data again"
            )
        return np.frombuffer(content, np.uint8)


class Shards(Packed):
    """Samples inside tar files, read where they lie: one descriptor a shard, opened when first needed."""

    def __init__(self, manifest: Manifest):
        super().__init__(manifest)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        allow_open_files(len(manifest.shards))

    def content(self, sample: int, name: str | None = None) -> np.ndarray:
        m = self.manifest
        shard, start, size = self.place(sample, name)
        content = np.empty(size, np.uint8)
        try:
            descriptor = self._descriptor(shard)
            found = os.preadv(descriptor, [content], start)
            while 0 < found < size and (more := os.preadv(descriptor, [content[found:]], start + found)):
                found += more  # network file systems may give a part
        except OSError as problem:
            raise SampleError(
                sample, f"cannot read {m.file(sample, name)}: {problem}. Is the shard still there?"
            ) from None
        if found != size:
            raise SampleError(
                sample, f"{m.file(sample, name)}: {found} bytes of {size}: the shard is shorter than when it was packed"
            )
        return content

    def _descriptor(self, shard: int) -> int:
        found = self._descriptors.get(shard)
        if found is None:
            with self._lock:
                found = self._descriptors.get(shard)
                if found is None:
                    found = os.open(self.manifest.shard_place(shard), os.O_RDONLY | os.O_CLOEXEC)
                    self._descriptors[shard] = found
        return found

    def __del__(self):
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def allow_open_files(shards: int) -> None:
    """Raise this process's limit of open files to hold all shards, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + SPARE_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise RequestError(
            f"{shards} shards need as many open files, and the limit is {hard} (ulimit -Hn): pack into larger shards "
            "(--shard-mb)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_storage(manifest: Manifest) -> Folder | Packed:
    if manifest.remote or manifest.kept:
        return Remote(manifest)
    return Shards(manifest) if manifest.shards else Folder(manifest)
