"""The small run that rows disturb, and what every run must have in the end: its weights, and each step once."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import yaml
from core import hold
from forked import Job

from hpc_lbsgd.records import read_metrics

STEPS = 30  # five epochs of 90 samples, 16 a step: 5 steps and a tail
RECIPE = {
    "seed": 11,
    "determinism": "any-ranks",
    "data": {"dataset": "hurt:dataset", "channels": 1, "mean": [0.0], "std": [1.0]},
    "model": {"name": "hurt:model"},
    "batch": {"samples_per_worker": 4, "workers": 4},
    "optim": {"base_lr": 0.1, "base_batch": 16},
    "schedule": {"kind": "cosine", "warmup_epochs": 1},
    "train": {"epochs": 5, "noise_scale_steps": 7, "preflight": False},
    "checkpoint": {"steps": 3, "keep": 2},
    "machine": {
        "engine": "torch",
        "stall_timeout_s": 2.0,
        "cross_check_steps": 4,
        "loader_threads": 1,
        "eval_batch": 4,
    },
}


def recipe(folder: Path, **sections: dict) -> Path:
    content = {**RECIPE, **{k: {**RECIPE[k], **v} if isinstance(v, dict) else v for k, v in sections.items()}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(ranks: int, path: Path, run: Path, *more, env: dict[str, str] | None = None, **job) -> Job:
    return Job(ranks, ["train", path, "--run", run, *more], path.parent, env or {}, **job)


def finished(ranks: int, path: Path, run: Path, *more, seconds: float = 60) -> str:
    """Train to the end; returns the hash of the weights."""
    job = train(ranks, path, run, *more)
    ended = job.wait(seconds)
    job.end()
    hold(ended and set(job.codes.values()) == {0}, f"no end: {job.codes}", job.said)
    return ending(run)


def ending(run: Path) -> str:
    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "end"][-1]["weights_sha256"]


@functools.cache
def reference() -> str:
    """The hash of the run that nothing disturbed, on one rank."""
    folder = Path(tempfile.mkdtemp(prefix="faults-reference-"))
    try:
        return finished(1, recipe(folder), folder / "run")
    finally:
        shutil.rmtree(folder)


def whole(run: Path, steps: int = STEPS) -> None:
    """Each step, evaluation and epoch is there once: no sample was lost or seen twice."""
    records = list(read_metrics(run / "metrics.jsonl"))
    for kind in ("step", "eval", "epoch"):
        found = [r["step"] for r in records if r["kind"] == kind]
        hold(found == sorted(set(found)), f"{kind} records: {found}")
    found = [r["step"] for r in records if r["kind"] == "step"]
    hold(found == list(range(steps)), f"steps: {found}")


def status(run: Path) -> dict:
    try:
        return json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return {}


def last_step(run: Path) -> int:
    """Steps on record."""
    return max((r["step"] + 1 for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "step"), default=0)


def resumed_at(run: Path) -> int:
    starts = [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "start"]
    return starts[-1] if starts else 0


def checkpointed(run: Path) -> int:
    """Steps done at the newest checkpoint that is there."""
    found = [int(p.name.removeprefix("step-")) for p in run.glob("checkpoints/step-*")]
    return max(found, default=0)
