"""From requests (an epoch and its samples) to tensors: what both loaders have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from hpc_lbsgd.data import augment
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import Folder, Request
from hpc_lbsgd.data.user import PREFIX, UserLoader, UserSet
from hpc_lbsgd.errors import RequestError

Batch = tuple[torch.Tensor, torch.Tensor]  # images (B, C, H, W) float32, normalised; labels (B,) int64


class Loader(Protocol):
    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """One batch a request, in order, made ahead of time. To be drained before it is called again."""


class Source:
    """One part of a data set with its recipe: which bytes, windows and labels a request means."""

    def __init__(self, data, manifest: Manifest, seed: int, train: bool):
        self.data, self.manifest, self.seed, self.train = data, manifest, seed, train
        self.storage = Folder(manifest)

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

    def labels(self, request: Request) -> np.ndarray:
        return self.manifest.labels[request.samples].astype(np.int64)


def open_set(recipe, path: str | Path) -> Manifest | UserSet:
    """The data set that a path stands for: a manifest, or a part of the user's own."""
    if str(path).startswith(PREFIX):
        return UserSet(recipe.data.dataset, str(path).removeprefix(PREFIX))
    return Manifest(Path(path))


def check_sizes(data, manifest: Manifest, train: bool) -> None:
    """Refuse images of the wrong size where nothing resizes them, before any step."""
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
