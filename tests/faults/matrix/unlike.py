"""Ranks of one job that are not alike: refused at the start, named, nothing written."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import runs
from core import Injection, Row, hold, one_line
from hurt import fail_at

from hpc_lbsgd.train import alike


def change(kind: str, rng: random.Random) -> None:
    """In one rank's process."""
    facts = alike.facts
    other = {"code": "hpc_lbsgd", "library": rng.choice(["torch", "numpy", "Python"]), "recipe": "recipe",
             "locale": "encoding of names (locale)"}  # fmt: skip
    if kind in other:
        alike.facts = lambda recipe: facts(recipe) | {other[kind]: "another"}
    if kind == "clock":
        plain, off = time.time, rng.choice([-1, 1]) * rng.uniform(70, 1e5)
        alike.time = type("time", (), {"time": staticmethod(lambda: plain() + off)})


def one(rng: random.Random, folder: Path) -> Iterator[Injection]:
    kind, ranks = rng.choice(["code", "library", "recipe", "locale", "clock", "data", "model"]), rng.randint(3, 4)
    path, run, rank = runs.recipe(folder, train={"preflight": kind == "model"}), folder / "run", rng.randrange(1, ranks)
    env = {"data": fail_at(rank, 0, "none", data=7), "model": fail_at(rank, 0, "none", width=1)}.get(kind, {})
    moment = f"other {kind} on rank {rank} of {ranks}"
    begun = time.monotonic()
    job = runs.train(ranks, path, run, env=env, before=lambda r: change(kind, rng) if r == rank else None)
    ended = job.wait(60)
    job.end()
    said = one_line(job.said)
    hold(ended and set(job.codes.values()) == {2}, f"{moment}: {job.codes}", job.said)
    hold(f"rank {rank} on" in said, f"{moment}: not named: {said}", job.said)
    hold("Traceback" not in job.said, job.said)
    hold(not (run / "metrics.jsonl").exists() and not (run / "recipe.yaml").exists(), f"{moment}: the folder is in use")
    yield Injection(moment, "refused at the start", round(time.monotonic() - begun, 2), 0, said)


ROWS = [
    Row("ranks-unlike", "one rank with other code, model, recipe, data, library, clock or locale",
        "refused at the start with exit code 2, named, no folder left", 40, one, ranks=True,
        cost_s=3.5)
]  # fmt: skip
