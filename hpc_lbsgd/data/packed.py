"""Samples inside shards: where each lies, and what it is once its bytes are there."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RunError


class SampleError(RunError):
    """One sample cannot be had. `sample`: its index."""

    def __init__(self, sample: int, message: str):
        super().__init__(message)
        self.sample = sample


class ChangedError(SampleError):
    """Its bytes are there, and are not those that were indexed."""


class Packed(ABC):
    """Samples inside shards, at known places."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def read(self, sample: int, name: str | None = None) -> np.ndarray:
        """The encoded image (or another one of that name), uint8 (bytes,); or pixels, uint8 (H, W, C), where the set is
        packed raw."""
        m, data = self.manifest, self.content(sample, name)
        if m.raw_channels:
            shape = int(m.heights[sample]), int(m.widths[sample]), m.raw_channels
            return data[-shape[0] * shape[1] * shape[2] :].reshape(shape)  # behind the header of a .npy file
        return data

    @abstractmethod
    def content(self, sample: int, name: str | None = None) -> np.ndarray:
        """All bytes of the tar member, uint8 (bytes,)."""

    def place(self, sample: int, name: str | None = None) -> tuple[int, int, int]:
        """(shard, first byte, bytes) of a sample's image, or of its file of that name."""
        m = self.manifest
        sizes, offsets = (m.sizes, m.offsets) if name is None else (m.of_file(name, "bytes"), m.of_file(name, "offset"))
        return int(m.shard_of[sample]), int(offsets[sample]), int(sizes[sample])
