"""One job on a real Slurm that takes what is free, and loses nodes: tests/lab.py has it.

Time lost by an event: from the last step before it to the first one after it that had not been taken before, less a
step's own time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from statistics import median

import lab as labs
import runs
import yaml
from core import Injection, Row, hold

from hpc_lbsgd.records import read_metrics

STEPS, NODES = 200, 32
LEAST, MOST, SPARE = 2, 6, 1
MODEL = """\
import os, socket, time
from torch import nn

class Pause(nn.Module):
    def forward(self, x):
        if "SLURM_JOB_ID" in os.environ and not os.path.exists("fast"):
            time.sleep(0.8 if os.path.exists("slow-" + socket.gethostname()) else 0.1)
        return x

def model(channels, classes):
    return nn.Sequential(Pause(), nn.Conv2d(channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, classes))
"""
RECIPE = {
    "seed": 7,
    "determinism": "any-ranks",
    "data": {"channels": 1, "image_size": 8, "mean": [127.0], "std": [60.0], "loader": "torchvision"},
    "model": {"name": "slow:model"},
    "batch": {"samples_per_worker": 8, "workers": 4, "last_batch": "partial"},  # fewer than ranks, at times
    "optim": {"base_lr": 0.2, "base_batch": 128},
    "schedule": {"kind": "cosine", "warmup_epochs": 1},
    "train": {"epochs": STEPS, "max_steps": STEPS, "preflight": False},
    "checkpoint": {"steps": 5},
    "machine": {"stall_timeout_s": 20.0},
}


class Watched:
    """The job, and the nodes that it finds free: others are taken by jobs that sleep."""

    def __init__(self, lab, folder: Path):
        self.lab, self.folder, self.run = lab, folder, folder / "run"
        self.dead: list[str] = []
        (folder / "sleep.sh").write_text("#!/bin/sh\nsleep 3000\n")
        self.fillers = [self._fill(name) for name in lab.nodes]

    def _fill(self, name: str) -> int:
        words = ["-p", "urgent", "-w", name, "--exclusive", "-o", "/dev/null", self.folder / "sleep.sh"]
        return labs.submitted(self.lab.call("sbatch", *words, cwd=self.folder).stdout)[0]

    def free(self, count: int) -> None:
        for _ in range(count):
            self.lab.call("scancel", self.fillers.pop())

    def submit(self, recipe: Path, launcher: str) -> None:
        site = labs.site(self.folder, ranks_per_node=1, max_restarts=5, launcher=launcher)
        words = ["--nodes", f"{LEAST}-{MOST}", "--spare", SPARE, "--grow-every", 5 / 3600, "--site", site]
        (self.number,) = labs.submit(self.lab, recipe, self.run, *words)

    def log(self) -> str:
        path = self.run / f"job-{self.number}.log"
        return path.read_text() if path.exists() else "(no log)"

    def records(self, kind: str) -> list[dict]:
        return [r for r in read_metrics(self.run / "metrics.jsonl") if r["kind"] == kind]

    def taken(self, before: str) -> list[dict]:
        """Steps on record before this moment, those that were lost again too."""
        files = (self.run / "metrics.lost.jsonl", self.run / "metrics.jsonl")
        return [r for file in files for r in read_metrics(file) if r["kind"] == "step" and r["time"] < before]

    def hosts(self) -> list[str]:
        """Of the ranks of the last start."""
        return [r["host"] for r in json.loads((self.run / "environment.json").read_text())[-1]["ranks"]]

    def wait(self, what: Callable[[], bool], said: str, within_s: float = 180) -> None:
        end = time.monotonic() + within_s
        while not what():
            hold(time.monotonic() < end, f"not within {within_s} s: {said}", self.log()[-4000:])
            time.sleep(0.2)

    def under_way(self, steps: int) -> None:
        """Until the last start has done some steps."""

        def done() -> bool:
            starts, taken = self.records("start"), self.records("step")
            return bool(starts and taken) and taken[-1]["step"] >= starts[-1]["step"] + steps

        self.wait(done, f"{steps} steps of a start")


# ---------------------------------------------------------------- events


def more_nodes(job: Watched, rng: random.Random) -> str:
    job.free(3)
    return "3 nodes become free (--grow-every)"


def rank_node_dies(job: Watched, rng: random.Random) -> str:
    batch = job.lab.job(job.number)["BatchHost"]
    job.dead.append(rng.choice([host for host in job.hosts() if host != batch]))
    job.lab.kill_node(job.dead[-1])
    return "a node dies"


def batch_node_dies(job: Watched, rng: random.Random) -> str:
    job.dead.append(job.lab.job(job.number)["BatchHost"])
    job.lab.kill_node(job.dead[-1])
    return "the node of the batch script dies"


def preemption(job: Watched, rng: random.Random) -> str:
    for host in rng.sample(job.hosts(), 2):
        job._fill(host)
    return "preemption: another job takes 2 of its nodes"


def rank_hangs(job: Watched, rng: random.Random) -> str:
    rank = rng.randrange(1, len(job.hosts()))
    pid = json.loads((job.run / "heartbeats" / f"rank-{rank:05d}.json").read_text())["pid"]
    where = ["--jobid", job.number, "--overlap", "--mpi=none", "-N1", "-n1", "-w", job.hosts()[rank]]
    job.lab.call("srun", *where, "--gpus-per-node=0", "kill", f"-{int(signal.SIGSTOP)}", pid)
    return f"a rank stops (SIGSTOP), stall_timeout_s {RECIPE['machine']['stall_timeout_s']:g}"


def stop(job: Watched, rng: random.Random) -> str:
    job.free(2)
    job.lab.call("scancel", "--signal=USR1", job.number)
    return "2 nodes become free, and scancel --signal=USR1"


def slow_node(job: Watched, rng: random.Random) -> str:
    host = job.hosts()[rng.randrange(1, RECIPE["batch"]["workers"])]  # of a rank that has samples
    (job.folder / f"slow-{host}").touch()
    return "a node becomes eight times as slow"


EVENTS = (more_nodes, rank_node_dies, preemption, rank_hangs, batch_node_dies, more_nodes, stop, slow_node)


def one(rng: random.Random, folder: Path) -> Iterator[Injection]:
    if reason := labs.why_not():
        print(f"elastic: {reason}", file=sys.stderr)
        return
    lab = labs.start(folder)
    launcher = rng.choice(("srun", "mpirun"))
    try:
        recipe = prepare(folder)
        whole = undisturbed(lab, recipe, folder)
        job = Watched(lab, folder)
        job.free(3)
        job.submit(recipe, launcher)
        for event in EVENTS:
            job.under_way(rng.randint(4, 9))
            nodes, starts, queued = len(job.hosts()), len(job.records("start")), lab.job(job.number)["Restarts"]
            what = event(job, rng)
            job.wait(lambda n=starts: len(job.records("start")) > n, f"a start after: {what}", 240)
            start = job.records("start")[starts]
            last = max(job.taken(before=start["time"]), key=lambda r: r["time"])
            job.wait(lambda n=last["step"]: job.records("step")[-1]["step"] > n, f"a new step after: {what}")
            first = next(r for r in job.records("step") if r["step"] > last["step"])
            seconds = seconds_of(first["time"]) - seconds_of(last["time"]) - median([first["step_s"], last["step_s"]])
            place = "in the same job" if lab.job(job.number)["Restarts"] == queued else "queued again"
            after = f"{len(job.hosts())} nodes by {launcher}, {place}"
            lost = last["step"] + 1 - start["step"]
            yield Injection(f"{what}, on {nodes} nodes", after, round(seconds, 1), lost, said_last(job))
        (folder / "fast").touch()
        state = lab.wait(job.number, 240)["JobState"]
        hold(state == "COMPLETED", state, job.log())
        runs.whole(job.run, STEPS)
        hold(runs.ending(job.run) == whole, "other weights than the run that nothing disturbed", job.log())
        counts = [start["ranks"] for start in job.records("start")]
        hold(sum(a != b for a, b in zip(counts, counts[1:], strict=False)) >= 6, f"nodes by start: {counts}")
    finally:
        lab.stop()


def prepare(folder: Path) -> Path:
    from conftest import write_images

    from hpc_lbsgd.data import tree

    tree.index(write_images(folder / "data", 203, 8), processes=1)
    (folder / "slow.py").write_text(MODEL)
    content = {**RECIPE, "data": {**RECIPE["data"], "train": str(folder / "data")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def undisturbed(lab, recipe: Path, folder: Path) -> str:
    env = {"PYTHONPATH": os.pathsep.join([str(folder), lab.env["PYTHONPATH"]])}
    lab.command("train", recipe, "--run", folder / "whole", cwd=folder, env=env, timeout=240)
    return runs.ending(folder / "whole")


def seconds_of(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def said_last(job: Watched) -> str:
    """What the batch script said about it."""
    lines = [line for line in job.log().splitlines() if "queued again" in line or "goes on with" in line]
    return lines[-1].split(": ", 2)[-1] if lines else ""


ROWS = [
    Row(
        "elastic",
        "a job on 2 to 6 nodes of a real Slurm with a spare one: nodes become free, die, hang, are taken away",
        "it goes on, in its allocation where it can; the weights are those of a run that nothing disturbed",
        len(EVENTS),
        one,
        ranks=True,
    )
]
