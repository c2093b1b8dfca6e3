"""Seconds from a launch of `train` to its first step, and from its last step to exit, of several checkouts in turn.

    python tools/measure_start.py RECIPE --trees . ../before --ranks 1,2,8 --rounds 5 [--set KEY=VALUE ...]

Medians, smallest and largest. What a checkout's `start` record has of its own (`start_s`) is shown by part. One round
before those that count warms the files' cache. cpu: processor seconds of the launcher and all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path


def seconds(record: dict) -> float:
    return datetime.fromisoformat(record["time"]).timestamp()


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(tree: str, ranks: int, recipe: str, settings: list[str]) -> dict[str, float]:
    """One run, by part."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        line = [sys.executable, "-m", "hpc_lbsgd.cli", "train", recipe, "--run", str(run)]
        for setting in settings:
            line += ["--set", setting]
        if ranks > 1:
            mpirun = str(Path(sys.executable).parent / "mpirun")
            line = [mpirun, "-np", str(ranks), "--oversubscribe", "--bind-to", "none", *line]
        used, begun = cpu_seconds(), time.time()
        result = subprocess.run(line, env=os.environ | {"PYTHONPATH": tree}, capture_output=True, text=True)
        ended = time.time()
        if result.returncode:
            sys.exit(f"{tree}: {result.stderr}")
        records = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        (start,) = (r for r in records if r["kind"] == "start")
        steps = [r for r in records if r["kind"] == "step"]
        status = seconds(json.loads((run / "status.json").read_text()))
    parts = {f"  {part}": taken for part, taken in start.get("start_s", {}).items()}
    return {
        "launch to first step": seconds(steps[0]) - steps[0]["step_s"] - begun,
        **parts,
        "last step to status": status - seconds(steps[-1]),
        "status to exit": ended - status,
        "all": ended - begun,
        "cpu": cpu_seconds() - used,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("recipe")
    p.add_argument("--trees", nargs="+", default=["."], help="checkouts")
    p.add_argument("--ranks", default="1,2", help="numbers of ranks")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = p.parse_args()
    trees = [str(Path(tree).resolve()) for tree in args.trees]
    for ranks in map(int, args.ranks.split(",")):
        found: dict[str, dict[str, list[float]]] = {tree: defaultdict(list) for tree in trees}
        for turn in range(args.rounds + 1):
            for tree in trees:
                for part, taken in measure(tree, ranks, args.recipe, args.set).items():
                    if turn:
                        found[tree][part].append(taken)
        for tree, parts in found.items():
            print(f"{tree}: {ranks} ranks, {args.rounds} rounds")
            for part, taken in parts.items():
                spread = f"({min(taken):.2f} to {max(taken):.2f})"
                print(f"  {part:22s} {statistics.median(taken):7.2f}  {spread}", flush=True)


if __name__ == "__main__":
    main()
