"""WebDataset as a peer of `bench loader`, where it is installed: tar shards of the same bytes, read in its order (that
of shards, and within a buffer of a thousand samples)."""

from __future__ import annotations

import functools
from pathlib import Path

from hpc_lbsgd.bench.loader.peers import Contestant, Files, Picture, batches
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data

SHARDS, BUFFER = 16, 1000


def sample(picture: Picture, read: dict) -> tuple:
    return picture(read["image"]), int(read["cls"])


def contestants(manifest: Manifest, data: Data, batch: int, folder: Path) -> list[Contestant]:
    """Shards are written into `folder`."""
    try:
        import webdataset
    except ImportError as problem:
        raise RequestError(f"WebDataset does not load ({problem}): pip install webdataset, or leave it out") from None
    files = Files(manifest)
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=-(-len(files) // SHARDS), verbose=0) as out:
        for i, (content, label) in enumerate(files[i] for i in range(len(files))):
            out.write({"__key__": f"{i:09d}", "image": content, "cls": label})
    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(BUFFER)
    dataset = dataset.map(functools.partial(sample, Picture(data)))
    return [Contestant("WebDataset", lambda threads: batches(dataset, batch, threads))]
