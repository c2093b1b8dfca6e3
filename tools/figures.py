"""Every plot of docs/results again, from the data that is stored beside it.

    python tools/figures.py [FOLDER]      (default: docs/results; `make figures`)

A plot NAME.png has NAME.json: what `--json` gave, with the command and the commit that measured it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hpc_lbsgd.bench.allreduce.show import plot as allreduce
from hpc_lbsgd.bench.loader.show import plot as loader
from hpc_lbsgd.bench.scaling.show import plot as scaling
from hpc_lbsgd.bench.step.show import plot as step
from hpc_lbsgd.reproduce import plots, table
from hpc_lbsgd.reproduce.experiments import EXPERIMENTS, SCALES

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BENCHMARKS = {"allreduce": allreduce, "loader": loader, "scaling": scaling, "step": step}


def draw(data: Path, picture: Path) -> None:
    """One plot from its data."""
    result = json.loads(data.read_text())
    if data.stem in BENCHMARKS:
        BENCHMARKS[data.stem](picture, result)
    else:
        report = table.from_json(result)
        plots.draw(picture, EXPERIMENTS[report.name], SCALES[report.scale], report, result)


def main(out: Path) -> None:
    for data in sorted(RESULTS.rglob("*.json")):
        picture = out / data.relative_to(RESULTS).with_suffix(".png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(data, picture)
        print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else RESULTS)
