"""The loaders that are compared, and the timing of one.

All decode, crop (RandomResizedCrop's distribution), resize, flip and normalise to float32; what differs is who does it
and in which order samples come.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from hpc_lbsgd.bench.loader import ffcv
from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.order import Permutation
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.recipe import Data, Machine

WARMUP_BATCHES = 4
CPU = torch.device("cpu")


class Contestant(NamedTuple):
    """A loader under test. start(threads) yields the size of one batch after the other, without end."""

    name: str
    start: Callable[[int], Iterator[int]]


def requests(manifest: Manifest, batch: int) -> Iterator[Request]:
    """Epoch after epoch in the global order; a batch never spans two epochs."""
    batch = min(batch, len(manifest))
    for epoch in itertools.count():
        order = Permutation(len(manifest), 0, epoch)
        for first in range(0, len(manifest) - batch + 1, batch):
            yield Request(epoch, order[first : first + batch])


def ours(name: str, manifest: Manifest, data: Data, batch: int, kind: str, device=CPU) -> Contestant:
    """Our loader: a true global shuffle, any storage. On a GPU a batch counts once it is there."""

    def start(threads: int) -> Iterator[int]:
        section = data.model_copy(update={"loader": kind})
        made = loaders.create(section, manifest, 0, True, batch, threads, 2, True, device, Machine().prefetch_mb)
        for images, _, _ in made.batches(requests(manifest, batch)):
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            yield len(images)

    return Contestant(name, start)


class Pictures(torch.utils.data.Dataset):
    """Files of a manifest as torchvision's ImageFolder would give them. decode: Pillow, or torchvision's own."""

    def __init__(self, manifest: Manifest, data: Data, native: bool):
        from torchvision.transforms import v2

        self.files = [manifest.file(i) for i in range(len(manifest))]
        self.labels, self.native = manifest.labels, native
        steps = [] if native else [v2.PILToTensor()]
        if data.augment == "resized-crop":
            steps.append(v2.RandomResizedCrop(data.image_size, data.crop_area, data.crop_aspect, antialias=True))
        steps += [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32)]
        self.transform = v2.Compose([*steps, v2.Normalize(data.mean, data.std)])
        self.channels = data.channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        if self.native:
            from torchvision.io import ImageReadMode, decode_image, read_file

            mode = ImageReadMode.GRAY if self.channels == 1 else ImageReadMode.RGB
            return self.transform(decode_image(read_file(self.files[index]), mode)), int(self.labels[index])
        from PIL import Image

        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("L" if self.channels == 1 else "RGB")), int(self.labels[index])


def torchvision(name: str, manifest: Manifest, data: Data, batch: int, native: bool) -> Contestant:
    """torch's DataLoader with a process a thread, as most people load images."""

    def start(threads: int) -> Iterator[int]:
        # not fork: DALI's threads live in this process, and their locks would be copied as they are
        made = torch.utils.data.DataLoader(
            Pictures(manifest, data, native), min(batch, len(manifest)), shuffle=True, num_workers=threads,
            drop_last=True, persistent_workers=True, multiprocessing_context="forkserver",
        )  # fmt: skip
        while True:
            for images, _ in made:
                yield len(images)

    return Contestant(name, start)


def dali_files(manifest: Manifest, data: Data, batch: int) -> Contestant:
    """DALI as its examples use it: its own file reader with the local shuffle buffer, random crops of its own."""

    def start(threads: int) -> Iterator[int]:
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(batch_size=min(batch, len(manifest)), num_threads=threads, device_id=None, seed=1)
        with pipeline:
            files = [manifest.file(i) for i in range(len(manifest))]
            encoded, _ = fn.readers.file(
                files=files, labels=manifest.labels.tolist(), random_shuffle=True, name="files"
            )
            output = {"device": "cpu", "output_type": types.GRAY if data.channels == 1 else types.RGB}
            if data.augment == "resized-crop":
                images = fn.decoders.image_random_crop(
                    encoded, random_area=list(data.crop_area), random_aspect_ratio=list(data.crop_aspect), **output
                )
                images = fn.resize(images, size=[data.image_size] * 2, antialias=True)
            else:
                images = fn.decoders.image(encoded, **output)
            images = fn.crop_mirror_normalize(
                images, mirror=fn.random.coin_flip(), mean=data.mean, std=data.std, output_layout="HWC"
            )
            pipeline.set_outputs(images)
        pipeline.build()
        while True:
            (out,) = pipeline.run()
            yield len(out)

    return Contestant("DALI file reader", start)


def ffcv_files(manifest: Manifest, data: Data, batch: int, kind: str, folder: Path) -> Contestant:
    """FFCV on its own file, written here of the same images."""
    path = folder / f"{len(os.listdir(folder))}.beton"
    ffcv.write(manifest, kind, path)
    return Contestant(
        f"FFCV, {ffcv.CLASSES[kind]}", lambda threads: ffcv.read(path, data, min(batch, len(manifest)), threads)
    )


def contestants(
    sets: list[str], data: Data, batch: int, peers: bool, ffcv_folder: Path | None = None
) -> list[Contestant]:
    """Ours on every set; the peers on those that are image files. `ffcv_folder`: where FFCV may keep its own files."""
    found = []
    for path in sets:
        m = Manifest(find(path))
        m.check_files()
        loaders.check_sizes(data, m, True)
        kind = "raw pixels" if m.raw_channels else "tar" if m.shards else "files"
        kind = f"remote {kind}" if m.remote else kind
        found.append(ours(f"ours, {kind} ({Path(path).name})", m, data, batch, "dali"))
        if torch.cuda.is_available():
            gpu = torch.device("cuda", 0)
            found.append(ours(f"ours, {kind} ({Path(path).name}), on the GPU", m, data, batch, "dali", gpu))
        if peers and not m.shards:
            found.append(dali_files(m, data, batch))
            found.append(torchvision("torchvision, Pillow", m, data, batch, native=False))
            found.append(torchvision("torchvision, decode_image", m, data, batch, native=True))
            found += [ffcv_files(m, data, batch, kind, ffcv_folder) for kind in ffcv.CLASSES if ffcv_folder]
    return found


def time_one(contestant: Contestant, threads: int, images: int) -> float:
    """Images a second over at least `images`, after a warm-up."""
    source = contestant.start(threads)
    try:
        for _ in range(WARMUP_BATCHES):
            next(source)
        count, before = 0, time.perf_counter()
        while count < images:
            count += next(source)
        return count / (time.perf_counter() - before)
    finally:
        source.close()
