"""Our loader beside those it is compared with, and the timing of one."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from hpc_lbsgd.bench.loader import ffcv, streaming, webdataset
from hpc_lbsgd.bench.loader.peers import Contestant, dali_files, torchvision
from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.order import Permutation
from hpc_lbsgd.data.source import Source
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.recipe import Data, Machine

WARMUP_BATCHES = 4
FORMATS = {"ffcv": ffcv, "streaming": streaming, "webdataset": webdataset}  # whose files are their own
CPU = torch.device("cpu")


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


def decoder(name: str, manifest: Manifest, data: Data, batch: int) -> Contestant:
    """Our loader's limit on a CPU: the same windows read and decoded by DALI, neither resized nor normalised."""

    def start(threads: int) -> Iterator[int]:
        from hpc_lbsgd.data.dali import DaliLoader

        made = DaliLoader(Source(data, manifest, 0, True), batch, threads, 2, True, CPU)
        for fetched, _ in made.decoded(requests(manifest, batch)):
            yield len(fetched.contents)

    return Contestant(name, start)


def contestants(
    sets: list[str],
    data: Data,
    batch: int,
    peers: bool,
    formats: Collection[str] = (),
    folder: Path | None = None,
    limit: bool = False,
) -> list[Contestant]:
    """Ours on every set, with its decoder's `limit`; the peers on those that are image files. `folder`: where peers of
    `formats` keep theirs."""
    found = []
    last, several = [Path(path).name for path in sets], False
    for path, name in zip(sets, last, strict=True):
        name = name if last.count(name) == 1 else path
        m = Manifest(find(path))
        m.check_files()
        loaders.check_sizes(data, m, True)
        kind = "raw pixels" if m.raw_channels else "tar" if m.shards else "files"
        kind = f"remote {kind}" if m.remote else kind
        found.append(ours(f"ours, {kind} ({name})", m, data, batch, "dali"))
        if limit and not m.raw_channels:
            found.append(decoder(f"decoder alone, {kind} ({name})", m, data, batch))
        if torch.cuda.is_available():
            gpu = torch.device("cuda", 0)
            found.append(ours(f"ours, {kind} ({name}), on the GPU", m, data, batch, "dali", gpu))
        if peers and not m.shards:
            others = [
                dali_files(m, data, batch),
                torchvision("torchvision, Pillow", m, data, batch, native=False),
                torchvision("torchvision, decode_image", m, data, batch, native=True),
            ]
            for own in formats:
                written = Path(tempfile.mkdtemp(dir=folder))
                others += FORMATS[own].contestants(m, data, min(batch, len(m)), written)
            found += [c._replace(name=f"{c.name} ({name})") for c in others] if several else others
            several = True
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
