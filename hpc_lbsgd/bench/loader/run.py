"""`bench loader`: images a second of our loader and of its peers, side by side in one run.

Contestants take turns: in each round every one of them is built, warmed up, timed over the same number of images and
taken down again, so that what else the machine does meets all alike. All decode, crop (RandomResizedCrop's
distribution), resize, flip and normalise to float32; what differs is who does it and in which order samples come.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hpc_lbsgd.bench.loader import ffcv
from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.order import Permutation
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.recipe import Data
from hpc_lbsgd.report import figures

WARMUP_BATCHES = 4


class Contestant(NamedTuple):
    """A loader under test. start(threads) yields the size of one batch after the other, without end."""

    name: str
    start: Callable[[int], Iterator[int]]


class Rate(NamedTuple):
    """Images a second of one contestant: one value a round."""

    name: str
    threads: int
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


# ---------------------------------------------------------------- contestants


def requests(manifest: Manifest, batch: int) -> Iterator[Request]:
    """Epoch after epoch in the global order; a batch never spans two epochs."""
    batch = min(batch, len(manifest))
    for epoch in itertools.count():
        order = Permutation(len(manifest), 0, epoch)
        for first in range(0, len(manifest) - batch + 1, batch):
            yield Request(epoch, order[first : first + batch])


def ours(name: str, manifest: Manifest, data: Data, batch: int, kind: str) -> Contestant:
    """Our loader: a true global shuffle, any storage."""

    def start(threads: int) -> Iterator[int]:
        made = loaders.create(
            data.model_copy(update={"loader": kind}), manifest, 0, True, batch, threads, 2, True, torch.device("cpu")
        )
        for images, _, _ in made.batches(requests(manifest, batch)):
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
        m = Manifest(manifests.find(path))
        m.check_files()
        loaders.check_sizes(data, m, True)
        kind = "raw pixels" if m.raw_channels else "tar" if m.shards else "files"
        found.append(ours(f"ours, {kind} ({Path(path).name})", m, data, batch, "dali"))
        if peers and not m.shards:
            found.append(dali_files(m, data, batch))
            found.append(torchvision("torchvision, Pillow", m, data, batch, native=False))
            found.append(torchvision("torchvision, decode_image", m, data, batch, native=True))
            found += [ffcv_files(m, data, batch, kind, ffcv_folder) for kind in ffcv.CLASSES if ffcv_folder]
    return found


# ---------------------------------------------------------------- measuring


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


def measure(found: list[Contestant], threads: list[int], rounds: int, images: int) -> list[Rate]:
    """Every contestant at every number of threads, `rounds` times, taking turns."""
    values: dict[tuple[str, int], list[float]] = {(c.name, t): [] for t in threads for c in found}
    with tqdm(total=rounds * len(values), desc="measuring", unit="run", disable=None) as bar:
        for number in range(rounds):
            # the order turns round, so that nobody always follows the same neighbour
            for c in found if number % 2 == 0 else found[::-1]:
                for t in threads:
                    values[c.name, t].append(time_one(c, t, images))
                    bar.update(1)
    return [Rate(name, t, v) for (name, t), v in values.items()]


def bench(
    sets: list[str],
    image_size: int,
    batch: int,
    threads: list[int],
    rounds: int,
    images: int,
    peers: bool = True,
    with_ffcv: bool = False,
) -> dict:
    """All that `bench loader` reports. Ratios are medians of the rounds' own ratios."""
    first = Manifest(manifests.find(sets[0]))
    grey = first.raw_channels == 1
    resized = not ((first.widths == first.widths[0]).all() and first.widths[0] == image_size == first.heights[0])
    data = Data(
        image_size=image_size,
        augment="resized-crop" if resized else "flip",
        channels=1 if grey else 3,
        **({"mean": [127.5], "std": [127.5]} if grey else {}),
    )
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(sets, data, batch, peers, Path(folder) if with_ffcv else None)
        rates = measure(found, threads, rounds, images)
    rows = []
    for rate in rates:
        leader = next(r for r in rates if r.threads == rate.threads)
        rows.append(
            {
                "loader": rate.name,
                "threads": rate.threads,
                "images_per_s": rate.median,
                "lowest": min(rate.values),
                "highest": max(rate.values),
                "first_over_this": statistics.median(a / b for a, b in zip(leader.values, rate.values, strict=True)),
                "values": rate.values,
            }
        )
    return {
        "sets": sets,
        "samples": len(first),
        "image_size": image_size,
        "batch": batch,
        "rounds": rounds,
        "images_a_round": images,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rows": rows,
    }


def show(result: dict) -> str:
    """The table, in Markdown."""
    lines = [
        f"| loader | threads | images/s, median of {result['rounds']} | lowest - highest | first row / this |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['loader']} | {r['threads']} | {r['images_per_s']:.0f} | {r['lowest']:.0f} - {r['highest']:.0f} | "
            f"{r['first_over_this']:.2f} |"
        )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Bars by loader, grouped by threads, with the spread."""
    names = list(dict.fromkeys(r["loader"] for r in result["rows"]))
    threads = list(dict.fromkeys(r["threads"] for r in result["rows"]))
    figure, (axis,) = figures.panels(1, (8, 0.9 + 0.55 * len(names)))
    height = 0.8 / len(threads)
    for i, t in enumerate(threads):
        rows = {r["loader"]: r for r in result["rows"] if r["threads"] == t}
        middle = [rows[n]["images_per_s"] for n in names]
        spread = [
            [m - rows[n]["lowest"] for n, m in zip(names, middle, strict=True)],
            [rows[n]["highest"] - m for n, m in zip(names, middle, strict=True)],
        ]
        axis.barh([k + i * height for k in range(len(names))], middle, height, xerr=spread, label=f"{t} threads")
    axis.set_yticks([k + 0.4 - height / 2 for k in range(len(names))], names)
    axis.invert_yaxis()
    axis.set_xlabel("images a second")
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figures.save(figure, path)
