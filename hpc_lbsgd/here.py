"""The machine at hand, for a plan of it: its ranks, and how fast a run on record went on as many."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

from hpc_lbsgd.data.order import passes_of_rank
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import gpus, world
from hpc_lbsgd.recipe import Recipe, load_resolved
from hpc_lbsgd.records import RunFolder, record_of
from hpc_lbsgd.runs import RUNS

# Sections and keys that say what a rank does in a step; rates, seeds and epochs may differ
WORK = ("model", "batch", "precision", "determinism", "wire", "fixed_point")
LOOKED_AT = 100  # runs, the newest
WARM_UP = 10  # steps of a start, left out where it has more
RECENT_BYTES = 2**20  # of records: a few thousand steps


class Here(NamedTuple):
    ranks: int  # a GPU each; without GPUs a core
    device: str  # cuda | cpu


def at_hand() -> Here:
    """As `make train` starts ranks."""
    count = gpus.listed()
    return Here(count, "cuda") if count else Here(world.cores(), "cpu")


def on_record(recipe: Recipe, here: Here, own: Iterable[Path] = ()) -> tuple[str, float] | None:
    """The newest run that did a step's work of `recipe` on these ranks of this host, of `own` and of what is in runs/,
    and the images/s of its busiest rank. recipe: `batch.workers` must be settled."""
    written = []
    for folder in map(RunFolder, (*own, *(RUNS.iterdir() if RUNS.is_dir() else ()))):
        with suppress(OSError):  # of others, or none
            written.append((folder.metrics.stat().st_mtime, folder))
    for _, folder in sorted(written, key=lambda pair: pair[0], reverse=True)[:LOOKED_AT]:
        try:
            if not ran_on(folder, here) or work_of(load_resolved(folder.recipe)) != work_of(recipe):
                continue
            rates = recent_rates(folder.metrics, here.ranks, recipe.batch.samples_per_worker)
        except (
            RequestError,
            OSError,
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
            ArithmeticError,
            RecursionError,
        ):
            continue  # damaged, or of others
        if rates:
            return str(folder.path), median(rates[WARM_UP:] or rates)
    return None


def ran_on(folder: RunFolder, here: Here) -> bool:
    """Whether the last start was on these ranks."""
    ranks = folder.starts()[-1]["ranks"] if folder.starts() else []
    alike = (r["host"] == socket.gethostname() and r["device"].startswith(here.device) for r in ranks)
    return len(ranks) == here.ranks and all(alike)


def recent_rates(metrics: Path, ranks: int, n: int) -> list[float]:
    """Of the last start's steps, if it was on so many ranks: images/s of the busiest rank, for whose step all wait."""
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - RECENT_BYTES))
        records = [record for record in map(record_of, file) if record]
    begun = max((i for i, r in enumerate(records) if r["kind"] == "start"), default=0)
    if records and records[begun]["kind"] == "start" and records[begun]["ranks"] != ranks:
        return []  # of the start before: the last one has not come so far
    rates = []
    for r in records[begun:]:
        if r["kind"] == "step" and (r.get("images_per_s") or 0) > 0:
            k = r["global_batch"] // n
            rates.append(r["images_per_s"] * len(passes_of_rank(k, 0, ranks, 1)) / k)
    return rates


def work_of(recipe: Recipe) -> list:
    return [recipe.data.model_dump(exclude={"eval", "samples", "classes"}), *(getattr(recipe, key) for key in WORK)]
