"""How much of a job's time is training, where a rank dies every ten minutes?

    python tests/faults/effective.py [--failures 3] [--minutes 10] [--ranks 2] [--out FILE]     (about 31 minutes)

`make train`'s recipe with `checkpoint.minutes: auto`, told how often it fails. A rank chosen at random is killed (-9);
as soon as `launch` has ended it is started again. The clock runs from the first launch to the first step behind the
last failure, so that each failure is counted with all that it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from soak import ranks_of  # noqa: E402

from hpc_lbsgd.records import read_metrics, seconds_of  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faults/effective.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="effective-") as folder:
        run = Path(folder) / "run"
        starts = hurt(run, args)
        result = shares(run, starts) | {"minutes": args.minutes, "ranks": args.ranks, "load": os.getloadavg()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def hurt(run: Path, args) -> list[dict[str, float]]:
    """The moments of each start: launched, failed, ended."""
    settings = ["data.eval=null", "train.epochs=1000", "checkpoint.minutes=auto"]
    settings += [f"checkpoint.mtbf_hours={args.minutes / 60}", "train.preflight=false"]
    fresh = ["train", "fashion-mnist", *(word for s in settings for word in ("--set", s)), "--run", run]
    rng, starts, failure = random.Random(args.seed), [], time.time()
    for number in range(args.failures + 1):
        words = [*fresh, *(["--resume"] if number else [])]
        launch = ["launch", "--np", args.ranks, "--oversubscribe", "--", *words]
        launched = time.time()
        job = subprocess.Popen(
            [sys.executable, "-m", "hpc_lbsgd", *map(str, launch)], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        try:
            if number == args.failures:
                while len(steps_of(run)) <= number or not steps_of(run)[number]:
                    assert job.poll() is None, f"start {number} ended with {job.returncode}"
                    time.sleep(0.2)
                starts.append({"launched": launched})
                job.send_signal(signal.SIGTERM)
                break
            while time.time() < failure + 60 * args.minutes:
                assert job.poll() is None, f"start {number} ended with {job.returncode}"
                time.sleep(0.1)
            os.kill(rng.choice(ranks_of(job.pid, run)), signal.SIGKILL)
            failure = time.time()
            job.wait(120)
            starts.append({"launched": launched, "failed": failure, "ended": time.time()})
            print(f"failure {number + 1} of {args.failures}: ended in {time.time() - failure:.1f} s", file=sys.stderr)
        finally:
            if job.poll() is None:
                job.terminate()
            job.wait(120)
    return starts


def steps_of(run: Path) -> list[list[dict]]:
    """Records of steps that count, by start."""
    found: list[list[dict]] = []
    for record in read_metrics(run / "metrics.jsonl"):
        if record["kind"] == "start":
            found.append([])
        elif record["kind"] == "step" and found:
            found[-1].append(record)
    return found


def shares(run: Path, starts: list[dict[str, float]]) -> dict:
    """Seconds by what they went for; they add up to all of it."""
    parts = dict.fromkeys(("steps", "start-up", "repeated steps", "detection", "restart"), 0.0)
    by_start = steps_of(run)
    for number, moments in enumerate(starts):
        first = by_start[number][0]
        begun = seconds_of(first["time"]) - first["step_s"]
        parts["start-up"] += begun - moments["launched"]
        if number:
            parts["restart"] += moments["launched"] - starts[number - 1]["ended"]
        if "failed" in moments:
            kept = seconds_of(by_start[number][-1]["time"])
            parts["steps"] += kept - begun
            parts["repeated steps"] += moments["failed"] - kept
            parts["detection"] += moments["ended"] - moments["failed"]
    total = sum(parts.values())
    stalls = [r["stall_s"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "checkpoint" and "stall_s" in r]
    return {
        "failures": len(starts) - 1,
        "seconds": round(total, 1),
        "ratio": round((parts["steps"] - sum(stalls)) / total, 4),
        "by_part": {name: round(seconds, 2) for name, seconds in parts.items()},
        "checkpoints": len(stalls),
        "stalls_s": round(sum(stalls), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
