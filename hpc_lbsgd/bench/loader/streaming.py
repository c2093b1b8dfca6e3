"""Streaming (MosaicML) as a peer of `bench loader`, where it is installed: shards of the same bytes in its own format,
read from local disk in its own shuffle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from hpc_lbsgd.bench.loader.peers import Contestant, Files, Picture, batches
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data

SHARD_BYTES = 1 << 26  # 64 MB, its default


class Pictures(torch.utils.data.IterableDataset):
    """What a stream gives to a process of the DataLoader, as a model is given it."""

    def __init__(self, stream: Iterable[dict], picture: Picture):
        self.stream, self.picture = stream, picture

    def __iter__(self) -> Iterator[tuple]:
        for read in self.stream:
            yield self.picture(read["image"]), read["class"]


def contestants(manifest: Manifest, data: Data, batch: int, folder: Path) -> list[Contestant]:
    """Shards are written into `folder`."""
    try:
        from streaming import MDSWriter, StreamingDataset
    except ImportError as problem:
        text = f"Streaming does not load ({problem}): pip install mosaicml-streaming, or leave it out"
        raise RequestError(text) from None
    files, columns = Files(manifest), {"image": "bytes", "class": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES, progress_bar=False) as out:
        for content, label in (files[i] for i in range(len(files))):
            out.write({"image": content, "class": label})

    def start(threads: int) -> Iterator[int]:
        stream = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
        yield from batches(Pictures(stream, Picture(data)), batch, threads)

    return [Contestant("Streaming", start)]
