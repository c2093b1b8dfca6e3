"""From requests (an epoch and its samples) to tensors: what both loaders have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from hpc_lbsgd.data import augment
from hpc_lbsgd.data.finish import cut
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.order import stream_key
from hpc_lbsgd.data.storage import Request, SampleError, open_storage
from hpc_lbsgd.data.user import PREFIX, UserLoader, UserSet
from hpc_lbsgd.errors import RequestError


class Batch(NamedTuple):
    images: torch.Tensor  # (B, C, H, W) float32, normalised
    labels: torch.Tensor  # (B,) int64
    replaced: int = 0  # samples that could not be had, with others in their place


class Fetched(NamedTuple):
    """A request with its bytes."""

    asked: Request
    given: Request  # the same, with other samples in place of those that cannot be had
    contents: list[np.ndarray]  # a sample each

    @property
    def replaced(self) -> int:
        return int((self.asked.samples != self.given.samples).sum())


class Loader(Protocol):
    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """One batch a request, in order, made ahead of time. To be drained before it is called again.

        Images may lie in memory that is used again: they are good until the next batch is asked for.
        """


class Source:
    """One part of a data set with its recipe: which bytes, windows and labels a request means."""

    def __init__(self, data, manifest: Manifest, seed: int, train: bool):
        self.data, self.manifest, self.seed, self.train = data, manifest, seed, train
        self.storage = open_storage(manifest)
        self.raw = manifest.raw_channels is not None
        self._bad: set[int] = set()

    # ------------------------------------------------------------ samples and their bytes

    def fetch(self, request: Request) -> Fetched:
        """The bytes of a request; a sample known to be bad is replaced, one that cannot be read becomes known."""
        given, contents = [], []
        for sample in request.samples.tolist():
            while True:
                candidate = self.stand_in(request.epoch, sample)
                try:
                    contents.append(self.storage.read(candidate))
                    break
                except SampleError as problem:
                    self.refuse(problem)
            given.append(candidate)
        return Fetched(request, Request(request.epoch, np.array(given, np.int64)), contents)

    def refuse(self, problem: SampleError) -> None:
        """A sample cannot be read or decoded: end the run (data.on_bad_image = error), or never ask for it again."""
        if self.data.on_bad_image == "error" or not self.train:
            raise problem
        self._bad.add(problem.sample)
        if len(self._bad) == len(self.manifest):
            raise problem

    def stand_in(self, epoch: int, sample: int) -> int:
        """`sample`, or where it is bad the first good one of a sequence that depends on (seed, epoch, sample) alone:
        the same on any rank, in any batch."""
        candidate, attempt = sample, 0
        while candidate in self._bad:
            attempt += 1
            candidate = stream_key("stand-in", self.seed, epoch, sample, attempt) % len(self.manifest)
        return candidate

    # ------------------------------------------------------------ what is made of them

    @property
    def resizes(self) -> bool:
        return self.data.augment == "resized-crop" if self.train else self.data.eval_resize > 0

    @property
    def crops(self) -> bool:
        """A window differs from the image."""
        return self.resizes or (self.train and self.data.augment == "pad-crop")

    def windows(self, request: Request) -> augment.Windows:
        width, height = (c[request.samples].astype(np.int64) for c in (self.manifest.widths, self.manifest.heights))
        return augment.windows(self.data, self.seed, request.epoch, request.samples, width, height, self.train)

    def cut(self, request: Request, images: list[np.ndarray]) -> list[np.ndarray]:
        """The windows of decoded images, each uint8 (h, w, C)."""
        if not self.crops:
            return images
        w = self.windows(request)
        places = zip(images, w.x.tolist(), w.y.tolist(), w.w.tolist(), w.h.tolist(), strict=True)
        return [cut(*place) for place in places]

    def labels(self, request: Request) -> np.ndarray:
        return self.manifest.labels[request.samples].astype(np.int64)


def open_set(recipe, path: str | Path) -> Manifest | UserSet:
    """The data set that a path stands for: a manifest, or a part of the user's own."""
    if str(path).startswith(PREFIX):
        return UserSet(recipe.data.dataset, str(path).removeprefix(PREFIX))
    return Manifest(Path(path))


def check_sizes(data, manifest: Manifest, train: bool) -> None:
    """Refuse images of the wrong size where nothing resizes them, and raw pixels of the wrong depth."""
    if manifest.raw_channels not in (None, data.channels):
        raise RequestError(
            f"data.channels = {data.channels}, but {manifest.path} is packed raw with {manifest.raw_channels}"
        )
    if Source(data, manifest, 0, train).resizes:
        return
    wrong = np.flatnonzero((manifest.widths != data.image_size) | (manifest.heights != data.image_size))
    if wrong.size:
        i, key = wrong[0], "augment" if train else "eval_resize"
        raise RequestError(
            f"data.image_size = {data.image_size}, but {wrong.size} of {len(manifest)} images have another size "
            f"({manifest.file(i)} is {manifest.widths[i]}x{manifest.heights[i]}) and data.{key} = "
            f"{getattr(data, key)} does not resize"
        )


def create(
    data,
    manifest: Manifest | UserSet,
    seed: int,
    train: bool,
    max_batch: int,
    threads: int,
    prefetch: int,
    channels_last: bool,
    device: torch.device,
) -> Loader:
    """The loader that `data.loader` names (a user's set has its own), for batches of up to `max_batch` samples."""
    if isinstance(manifest, UserSet):
        return UserLoader(manifest, seed, threads, prefetch, channels_last, device)
    source = Source(data, manifest, seed, train)
    if data.loader == "dali":
        from hpc_lbsgd.data.dali import DaliLoader as kind
    else:
        from hpc_lbsgd.data.torchvision import TorchvisionLoader as kind
    return kind(source, max_batch, threads, prefetch, channels_last, device)
