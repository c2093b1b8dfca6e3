"""A long run of small steps: do memory, descriptors and threads of its ranks stay what they were?

    python tests/faults/soak.py [--steps 20000] [--ranks 4] [--out FILE]      (about 20 minutes on two cores)

Checkpoints, evaluations, the preflight and the cross-check are on. Each rank is looked at in /proc once a second; what
is written are its medians over each tenth of the run. Memory is compared from the second tenth to the last; descriptors
and threads, of which some are made when they are first needed, from the fifth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from conftest import SMALL_RECIPE, changed, write_images, write_recipe  # noqa: E402

MOST = 0.01  # growth that is still none
FROM = {"resident_kb": 1, "descriptors": 4, "threads": 4}  # the tenth that the last is compared with


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/faults/soak.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(Path(folder), args.steps, args.ranks)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if result["status"] == "done" and result["grown"] == [] else 1


def soak(folder: Path, steps: int, ranks: int) -> dict:
    from hpc_lbsgd.data import tree

    for part, samples in (("train", 203), ("eval", 61)):
        tree.index(write_images(folder / part, samples, 8), processes=1)
    content = changed(
        SMALL_RECIPE, determinism="any-ranks", data__train=str(folder / "train"), data__eval=str(folder / "eval"),
        batch__workers=4, train__epochs=steps // 7 + 1, train__max_steps=steps, train__eval_epochs=20,
        train__noise_scale_steps=100, checkpoint={"steps": 200},
    )  # fmt: skip
    recipe, run, begun = write_recipe(folder / "soak.yaml", content), folder / "run", time.monotonic()
    words = [
        sys.executable,
        "-m",
        "hpc_lbsgd.cli",
        "launch",
        "--np",
        ranks,
        "--oversubscribe",
        "--",
        "train",
        recipe,
        "--run",
        run,
    ]
    with open(folder / "log", "w") as log:
        job = subprocess.Popen(list(map(str, words)), stdout=log, stderr=log)
        looks: dict[int, list[dict]] = {}
        try:
            while job.poll() is None:
                for pid in ranks_of(job.pid, run):
                    if found := look(pid):
                        looks.setdefault(pid, []).append(found)
                time.sleep(1)
        finally:
            job.terminate()
            job.wait(60)
    status = json.loads((run / "status.json").read_text()) if (run / "status.json").exists() else {}
    rows = [tenths(pid, seen[:-2]) for pid, seen in sorted(looks.items()) if len(seen) >= 20]
    return {
        "steps": status.get("step"),
        "status": status.get("status", (folder / "log").read_text()[-2000:]),
        "ranks": len(rows),
        "seconds": round(time.monotonic() - begun),
        "looks": [len(seen) for seen in looks.values()],
        "by_rank": rows,
        "grown": [
            f"{kind} of pid {row['pid']}"
            for row in rows
            for kind, first in FROM.items()
            if row[kind][-1] > row[kind][first] * (1 + MOST)
        ],
    }


def ranks_of(launcher: int, run: Path) -> list[int]:
    """Processes below `launcher` that train into `run`."""
    below, found = {launcher}, []
    for entry in sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
        try:
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile
        if parent in below:
            below.add(entry)
            if b"train" in words and b"launch" not in words and b"python" in os.path.basename(words[0]):
                found.append(entry)
    return found


def look(pid: int) -> dict | None:
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        return {
            "resident_kb": int(status["VmRSS"].split()[0]),
            "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
            "threads": int(status["Threads"]),
        }
    except (OSError, KeyError):
        return None


def tenths(pid: int, seen: list[dict]) -> dict:
    cuts = [round(i * len(seen) / 10) for i in range(11)]
    spans = [seen[a:b] for a, b in itertools.pairwise(cuts)]
    return {"pid": pid} | {kind: [median(s[kind] for s in span) for span in spans] for kind in FROM}


if __name__ == "__main__":
    sys.exit(main())
