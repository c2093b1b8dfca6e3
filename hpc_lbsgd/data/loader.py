"""The loader of a recipe: which data set a path stands for, whether it fits, and who makes batches of it."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc_lbsgd.data.bounded import UNDER_WAY, Bounded
from hpc_lbsgd.data.foreseen import Foreseen
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.own import PackedSet
from hpc_lbsgd.data.remote import Remote
from hpc_lbsgd.data.source import Loader, Source
from hpc_lbsgd.data.user import PREFIX, UserSet
from hpc_lbsgd.data.user_loader import UserLoader
from hpc_lbsgd.errors import RequestError

ON_THE_WAY = 0.25  # share of machine.prefetch_mb for what is fetched of a remote set
READ_AHEAD_MB = 256.0  # the same, where nobody says


def open_set(recipe, path: str | Path) -> Manifest | UserSet:
    """The data set that a path stands for: a manifest, or a part of the user's own."""
    if str(path).startswith(PREFIX):
        return UserSet(recipe.data.dataset, str(path).removeprefix(PREFIX))
    return Manifest(Path(path))


def check_sizes(data, manifest: Manifest, train: bool) -> None:
    """Refuse images of the wrong size where nothing resizes them, and raw pixels of the wrong depth."""
    if manifest.own:
        return
    if manifest.raw_channels not in (None, data.channels):
        raise RequestError(
            f"data.channels = {data.channels}, but {manifest.path} is packed raw with {manifest.raw_channels}"
        )
    if not Source(data, manifest, 0, train).of_one_size:
        return
    looked_at = wrong = 0
    example = None
    for rows in manifest.looked_at():
        fits = (manifest.widths[rows] == data.image_size) & (manifest.heights[rows] == data.image_size)
        if example is None and not fits.all():
            example = rows.start + int(fits.argmin())
        looked_at, wrong = looked_at + len(fits), wrong + int((~fits).sum())
    if example is not None:
        i, key = example, "augment" if train else "eval_resize"
        raise RequestError(
            f"data.image_size = {data.image_size}, but {wrong} of {looked_at} images have another size "
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
    prefetch_mb: float | None = None,
    processes: int | None = None,
) -> Loader:
    """The loader that `data.loader` names (a user's set has its own), for batches of up to `max_batch` samples.

    prefetch_mb: on CPUs, what samples may take while they are made ahead of time (default: no bound). processes:
    that make a user's samples (default: threads do).
    """
    if isinstance(manifest, Manifest) and manifest.own:
        manifest = PackedSet(manifest)
    ahead_bytes = READ_AHEAD_MB * 1e6 if prefetch_mb is None else prefetch_mb * 1e6 * ON_THE_WAY
    if isinstance(manifest, (UserSet, PackedSet)):
        made = UserLoader(manifest, seed, threads, prefetch, channels_last, device, processes)
        if isinstance(manifest, PackedSet) and isinstance(manifest.storage, Remote):
            return Foreseen(made, manifest.storage, manifest.files, ahead_bytes)
        return made
    source = Source(data, manifest, seed, train)
    if data.loader == "dali" and source.pictures:
        from hpc_lbsgd.data.dali import DaliLoader as kind
    else:
        from hpc_lbsgd.data.torchvision import TorchvisionLoader as kind
    made: Loader = kind(source, max_batch, threads, prefetch, channels_last, device)
    remote = isinstance(source.storage, Remote)
    if prefetch_mb is not None and device.type != "cuda":  # there, who decodes an image may depend on its batch
        share = 1 - ON_THE_WAY if remote else 1
        made = Bounded(made, source, share * prefetch_mb * 1e6 / (max(prefetch, threads) + UNDER_WAY))
    return Foreseen(made, source.storage, source.read_names, ahead_bytes) if remote else made
