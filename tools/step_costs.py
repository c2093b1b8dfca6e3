"""What measuring the noise scale and changing the batch cost, from the metrics of runs that did.

python tools/step_costs.py runs/reproduce/small/cells/*/

Measured: the median step on which the noise scale was measured over the median of the others at the same batch, loader
waits left out. Changed: time an image of the first step after the batch grew, over the median of the 20 that follow.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.records import RunFolder, read_metrics

FEWEST = 5  # measured steps of a run
AFTER = 20  # steps


def measured(steps: list[dict], every: int) -> tuple[float, float] | None:
    """(time of a measured step over another's, share of wall time that measuring takes)."""
    steps = [s for s in steps if s["global_batch"] == steps[0]["global_batch"]]
    with_it, without = (
        [s["step_s"] - s["data_wait_s"] for s in steps if ("noise_trace" in s) == w] for w in (True, False)
    )
    if len(with_it) < FEWEST:
        return None
    ratio = statistics.median(with_it) / statistics.median(without)
    return ratio, (ratio - 1) / every


def changed(steps: list[dict]) -> list[float]:
    """First step after each growth of the batch, over those that follow; time an image."""
    ratios = []
    for i in range(1, len(steps)):
        if steps[i]["global_batch"] > steps[i - 1]["global_batch"]:
            batch = steps[i]["global_batch"]
            after = [s["step_s"] / s["samples"] for s in steps[i + 1 : i + 1 + AFTER] if s["global_batch"] == batch]
            ratios.append(steps[i]["step_s"] / steps[i]["samples"] / statistics.median(after))
    return ratios


def show(name: str, values: list[float]) -> None:
    if values:
        middle, low, high = statistics.median(values), min(values), max(values)
        print(f"{name}: {len(values)}, median {middle:.4g}, {low:.4g} to {high:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; what is none is passed over")
    costs, growths = [], []
    for folder in map(RunFolder, parser.parse_args().runs):
        if not folder.exists():
            continue
        recipe = recipes.load_resolved(folder.recipe)
        steps = [r for r in read_metrics(Path(folder.metrics)) if r["kind"] == "step"]
        if steps and recipe.train.noise_scale_steps:
            costs.append(measured(steps, recipe.train.noise_scale_steps))
            growths += changed(steps)
    default = [c for c in costs if c]
    show("measured step / another", [c[0] for c in default])
    show("share of wall time", [c[1] for c in default])
    show("first step after growth / next", growths)


if __name__ == "__main__":
    main()
