"""Ranks that die, raise or hang, by phase; real ranks, one run that suffers several after each other."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import runs
from core import Injection, Row, hold, one_line
from hurt import KINDS, PHASES, fail_at

CHAIN = 6  # faults of one run
END_S = 30.0


def one(rng: random.Random, folder: Path) -> Iterator[Injection]:
    path, run = runs.recipe(folder), folder / "run"
    mark = folder / "mark"
    for _ in range(CHAIN):
        ranks = rng.randint(2, 4)
        first = runs.checkpointed(run)
        kind = rng.choice(KINDS)
        # by rule an evaluation and a start may last: nobody can tell a long one from one that hangs
        phases = [p for p in PHASES if kind != "deadlock" or p in ("data", "forward", "sum")]
        phase = rng.choice(phases)
        step = -1 if phase == "start" else rng.randint(first, max(first, runs.STEPS - 8))
        victim = rng.randrange(ranks)
        mark.unlink(missing_ok=True)
        env = fail_at(victim, step, kind, phase, mark=str(mark), code=rng.choice([0, 1, 2, 3]))
        moment = f"{kind} in {phase} of step {step} on rank {victim} of {ranks}"
        job = runs.train(ranks, path, run, "--resume-if-exists", env=env)
        job.wait_for(mark.exists, 60)
        hold(mark.exists(), f"{moment}: it did not happen", job.said)
        begun = time.monotonic()
        hung = victim if kind == "deadlock" else None
        gone = job.wait(END_S, but=hung)
        took = time.monotonic() - begun
        job.end()
        hold(gone, f"{moment}: ranks were there after {END_S} s: {job.codes}", job.said)
        hold(any(code for code in job.codes.values()), f"{moment}: {job.codes}", job.said)
        said, status = job.said, runs.status(run)
        if run.exists() and (run / "recipe.yaml").exists():
            hold(status.get("status") == "failed" and status.get("error"), f"{moment}: no cause: {status}", said)
        if kind == "exception":
            hold("injected exception" in status.get("error", said), f"{moment}: another cause: {status}", said)
        if kind == "deadlock":
            hold(f"rank {victim} on" in status["error"], f"{moment}: not named: {status}", said)
        done = runs.last_step(run)
        yield Injection(moment, status.get("error", "")[:160], round(took, 2), done - runs.checkpointed(run),
                        one_line(said))  # fmt: skip
    ranks = rng.randint(1, 4)
    digest = runs.finished(ranks, path, run, "--resume-if-exists")
    hold(digest == runs.reference(), f"on {ranks} ranks: other weights than the run that nothing disturbed")
    runs.whole(run)


ROWS = [
    Row(
        "rank-dies",
        "rank killed -9, segfault, `os._exit`, exception, or deadlock in a user's data set or model; in start-up, "
        "data, forward, sum, checkpoint, evaluation",
        "all ranks end within 30 s, cause on record; resumed on another number of ranks to the same weights",
        300,
        one,
        ranks=True,
        cost_s=4.5,
    )
]
