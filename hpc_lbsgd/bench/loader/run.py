"""Images a second of our loader and of its peers, side by side in one run.

Contestants take turns: in each round every one of them is built, warmed up, timed over the same number of images and
taken down again, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from hpc_lbsgd import progress
from hpc_lbsgd.bench.core.spread import by_round
from hpc_lbsgd.bench.core.turns import there_and_back
from hpc_lbsgd.bench.loader.measure import Contestant, contestants, time_one
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data


class Rate(NamedTuple):
    """Images a second of one contestant: one value a round."""

    name: str
    threads: int
    values: list[float]


def measure(found: list[Contestant], threads: list[int], rounds: int, images: int) -> list[Rate]:
    """Every contestant at every number of threads, `rounds` times, taking turns."""
    values: dict[tuple[str, int], list[float]] = {(c.name, t): [] for t in threads for c in found}
    with progress.bar(total=rounds * len(values), desc="measuring", unit="run") as bar:
        for number in range(rounds):
            for c in there_and_back(found, number):
                for t in threads:
                    values[c.name, t].append(time_one(c, t, images))
                    bar.update(1)
    return [Rate(name, t, v) for (name, t), v in values.items()]


def loader(
    sets: list[str],
    image_size: int,
    batch: int,
    threads: list[int],
    rounds: int,
    images: int,
    peers: bool = True,
    formats: Collection[str] = (),
    limit: bool = False,
) -> dict:
    """All that `bench loader` reports. Ratios are medians of the rounds' own ratios."""
    if len(set(sets)) < len(sets):
        raise RequestError(f"{' '.join(sets)}: a set is named twice")
    first = Manifest(find(sets[0]))
    grey = first.raw_channels == 1
    resized = not ((first.widths == first.widths[0]).all() and first.widths[0] == image_size == first.heights[0])
    data = Data(
        image_size=image_size,
        augment="resized-crop" if resized else "flip",
        channels=1 if grey else 3,
        **({"mean": [127.5], "std": [127.5]} if grey else {}),
    )
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(sets, data, batch, peers, formats, Path(folder), limit)
        rates = measure(found, threads, rounds, images)
    rows = []
    for rate in rates:
        leader = next(r for r in rates if r.threads == rate.threads)
        rows.append(
            {
                "loader": rate.name,
                "threads": rate.threads,
                "images_per_s": median(rate.values),
                "lowest": min(rate.values),
                "highest": max(rate.values),
                "first_over_this": median(by_round(leader.values, rate.values)),
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
