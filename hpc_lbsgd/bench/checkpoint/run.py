"""Both ways in turn, for each recipe's model."""

from __future__ import annotations

import socket
from pathlib import Path
from statistics import median

from hpc_lbsgd import progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.checkpoint.measure import WAYS, Bench, Cost
from hpc_lbsgd.bench.core.spread import spread
from hpc_lbsgd.bench.core.turns import there_and_back
from hpc_lbsgd.errors import RequestError


def checkpoint(names: list[str], folder: Path, rounds: int) -> dict:
    """Median and spread of stall and write, a row a model and way. Raises RequestError for a folder or recipe that is
    not there."""
    if not folder.is_dir():
        raise RequestError(f"--folder {folder}: no such folder")
    found = [(name, recipes.read(name, []).with_workers(1)) for name in names]
    rows = []
    with progress.bar(total=len(found) * rounds * len(WAYS), desc="measuring", unit="checkpoint") as bar:
        for name, recipe in found:
            bench = Bench(recipe, folder)
            try:
                bench.cost(WAYS[1])  # makes the memory
                costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
                for number in range(rounds):
                    for way in there_and_back(WAYS, number):
                        costs[way].append(bench.cost(way))
                        bar.update(1)
            finally:
                bench.close()
            rows += [row(name, way, each) for way, each in costs.items()]
    return {"machine": socket.gethostname(), "folder": str(folder), "rounds": rounds, "rows": rows}


def row(name: str, way: str, costs: list[Cost]) -> dict:
    return {
        "recipe": name,
        "way": way,
        "bytes": round(median(c.bytes for c in costs)),
        **spread("stall_s", (c.stall_s for c in costs)),
        **spread("write_s", (c.write_s for c in costs)),
    }
