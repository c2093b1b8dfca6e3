"""The trainer's own loader, for a script: images of a manifest in the global order, cut, flipped and normalised."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any

from hpc_lbsgd.api.shuffle import GlobalShuffle, Step
from hpc_lbsgd.api.world import begun
from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data.bounded import copied
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.reading import validated
from hpc_lbsgd.sections import Data
from hpc_lbsgd.theory.schedule import Schedule


class Loader:
    """Steps of parts whose `inputs` are images, (n, C, H, W) float32, and whose `labels` are (n,) int64; or what the
    keys `inputs` and `targets` name, several as a dict.

        for step in lb.Loader("data/imagenet/train", schedule, seed=0, image_size=224):
            for part in step.workers: ...

    path            a folder of class folders, or a manifest, as `data.train` of a recipe
    seed, start, rank, size    as in `lb.GlobalShuffle`
    threads         that decode, on this rank (default: its cores, up to 8)
    prefetch        batches made ahead of time
    channels_last   the memory format of `inputs`
    keys            those of a recipe's `data` section: loader, image_size, channels, augment, mean, std ...

    What is random - crops, flips - is a function of (seed, epoch, sample). `classes`: their names, in order of labels.
    Raises RequestError for what cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        schedule: Schedule,
        *,
        seed: int = 0,
        start: int = 0,
        rank: int | None = None,
        size: int | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        channels_last: bool = False,
        **keys: Any,
    ):
        self._data = validated(Data, {**keys, "train": str(path)}, "lb.Loader")
        self._manifest = Manifest(find(path))
        loaders.check_sizes(self._data, self._manifest, train=True)
        self.shuffle = GlobalShuffle(len(self._manifest), schedule, seed, start, rank, size)
        if self.shuffle.rank == 0:
            self._manifest.check_files()
        self.classes: list[str] = list(self._manifest.classes)
        world = begun()
        self._threads = threads or min(8, world.engine.cores if world else worlds.cores())
        self._prefetch, self._channels_last = prefetch, channels_last

    def __iter__(self) -> Iterator[Step]:
        """Every step from `start` to the end, whether this rank has workers in it or not."""
        shuffle = self.shuffle
        made = loaders.create(
            self._data,
            self._manifest,
            shuffle.seed,
            True,
            shuffle.schedule.samples_per_worker,
            self._threads,
            self._prefetch,
            self._channels_last,
            shuffle.device,
        )
        batches = made.batches(starmap(Request, shuffle.passes()))
        if shuffle.device.type == "cpu":  # where a loader uses memory again, and a script may keep its parts
            batches = map(copied, batches)
        return shuffle.parted((batch.inputs, batch.labels) for batch in batches)

    def __len__(self) -> int:
        """Steps from `start` to the end."""
        return self.shuffle.schedule.steps - self.shuffle.start
