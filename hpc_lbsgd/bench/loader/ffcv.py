"""FFCV as a peer of `bench loader`, where it is installed: its own file format made from the same image files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hpc_lbsgd.bench.loader.peers import Contestant
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data

CLASSES = {"jpeg": "JPEG q90, 500 px", "raw": "raw, 256 px"}


class Decoded:
    """What FFCV's writer reads: a decoded picture and its label."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int):
        from PIL import Image

        with Image.open(self.manifest.file(index)) as image:
            return np.asarray(image.convert("RGB")), int(self.manifest.labels[index])


def write(manifest: Manifest, kind: str, path: Path) -> None:
    """Pack image files for FFCV: JPEG of quality 90 and at most 500 pixels, or raw of at most 256."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
    except ImportError as problem:
        raise RequestError(f"FFCV does not load ({problem}): pip install ffcv, or leave it out") from None
    sizes = {"jpeg": ("jpg", 500), "raw": ("raw", 256)}
    mode, side = sizes[kind]
    field = RGBImageField(write_mode=mode, max_resolution=side, jpeg_quality=90)
    DatasetWriter(str(path), {"image": field, "label": IntField()}, num_workers=2).from_indexed_dataset(
        Decoded(manifest)
    )


def read(path: Path, data: Data, batch: int, threads: int) -> Iterator[int]:
    """Sizes of batches, without end: random resized crops in a truly random order, mirrored, normalised."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    size = data.image_size
    crop = RandomResizedCropRGBImageDecoder((size, size), scale=tuple(data.crop_area), ratio=tuple(data.crop_aspect))
    normalise = NormalizeImage(np.array(data.mean), np.array(data.std), np.float32)
    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [crop, RandomHorizontalFlip(), normalise, ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    while True:
        for images, _ in loader:
            yield len(images)


def contestants(manifest: Manifest, data: Data, batch: int, folder: Path) -> list[Contestant]:
    """JPEG and raw, written into `folder`."""
    found = []
    for kind, name in CLASSES.items():
        path = folder / f"{kind}.beton"
        write(manifest, kind, path)
        found.append(Contestant(f"FFCV, {name}", lambda threads, path=path: read(path, data, batch, threads)))
    return found
