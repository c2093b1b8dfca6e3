"""Bytes of samples by index: what a loader reads from, wherever the images lie."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RunError

READERS = 4  # threads that read ahead; they wait for the file system, not for the processor


class Request(NamedTuple):
    """One batch to be made: samples of one epoch, in order (int64, not empty)."""

    epoch: int
    samples: np.ndarray


class Folder:
    """Image files below a manifest's root."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def name(self, sample: int) -> str:
        return self.manifest.file(sample)

    def read(self, samples: np.ndarray) -> list[np.ndarray]:
        """Encoded images, one uint8 array a sample."""
        return [self._read_one(int(i)) for i in samples]

    def _read_one(self, sample: int) -> np.ndarray:
        path, expected = self.manifest.file(sample), int(self.manifest.sizes[sample])
        try:
            # bare system calls: np.fromfile takes five times as long for a small file
            descriptor = os.open(path, os.O_RDONLY)
            try:
                content = os.read(descriptor, expected + 1)
            finally:
                os.close(descriptor)
        except OSError as problem:
            raise RunError(f"cannot read a sample: {problem}. Is the data still there?") from None
        if len(content) != expected:
            raise RunError(
                f"{path}: {len(content)} bytes or more, {expected} when it was indexed. Index the data again"
            )
        return np.frombuffer(content, np.uint8)


def read_ahead(storage: Folder, requests: Iterable[Request], depth: int) -> Iterator[tuple[Request, list[np.ndarray]]]:
    """Requests with their bytes, in order, up to `depth` of them read before they are asked for."""
    waiting: deque[tuple[Request, Future]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        try:
            for request in requests:
                waiting.append((request, pool.submit(storage.read, request.samples)))
                if len(waiting) > depth:
                    ready, future = waiting.popleft()
                    yield ready, future.result()
            while waiting:
                ready, future = waiting.popleft()
                yield ready, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
