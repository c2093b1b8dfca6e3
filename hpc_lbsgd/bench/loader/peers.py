"""The loaders that ours is compared with, as their own examples use them, on the image files of a manifest.

All decode, crop (RandomResizedCrop's distribution), resize, flip and normalise to float32; what differs is who does it
and in which order samples come. Those that read a format of their own have a file each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.recipe import Data


class Contestant(NamedTuple):
    """A loader under test. start(threads) yields the size of one batch after the other, without end."""

    name: str
    start: Callable[[int], Iterator[int]]


class Picture:
    """An encoded picture made what a model is given. native: decoded by torchvision itself, else by Pillow."""

    def __init__(self, data: Data, native: bool = True):
        from torchvision.transforms import v2

        self.native, self.channels = native, data.channels
        steps = [] if native else [v2.PILToTensor()]
        if data.augment == "resized-crop":
            steps.append(v2.RandomResizedCrop(data.image_size, data.crop_area, data.crop_aspect, antialias=True))
        steps += [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32)]
        self.transform = v2.Compose([*steps, v2.Normalize(data.mean, data.std)])

    def __call__(self, content: bytes) -> torch.Tensor:
        if self.native:
            from torchvision.io import ImageReadMode, decode_image

            mode = ImageReadMode.GRAY if self.channels == 1 else ImageReadMode.RGB
            return self.transform(decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode))
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            return self.transform(image.convert("L" if self.channels == 1 else "RGB"))


class Files(torch.utils.data.Dataset):
    """Pictures and labels of a manifest, as torchvision's ImageFolder would give them; `picture` None: as they lie."""

    def __init__(self, manifest: Manifest, picture: Picture | None = None):
        self.files = [manifest.file(i) for i in range(len(manifest))]
        self.labels, self.picture = manifest.labels, picture

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        with open(self.files[index], "rb") as file:
            content = file.read()
        return self.picture(content) if self.picture else content, int(self.labels[index])


def batches(dataset: torch.utils.data.Dataset, batch: int, threads: int, **options) -> Iterator[int]:
    """Sizes of batches of torch's DataLoader with a process a thread, epoch after epoch."""
    # not fork: DALI's threads live in this process, and their locks would be copied as they are
    made = torch.utils.data.DataLoader(
        dataset, batch, num_workers=threads, drop_last=True, persistent_workers=True,
        multiprocessing_context="forkserver", **options,
    )  # fmt: skip
    while True:
        for images, _ in made:
            yield len(images)


def torchvision(name: str, manifest: Manifest, data: Data, batch: int, native: bool) -> Contestant:
    """torch's DataLoader over files, as most people load images."""
    dataset = Files(manifest, Picture(data, native))
    return Contestant(name, lambda threads: batches(dataset, min(batch, len(dataset)), threads, shuffle=True))


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
