"""Ranks that compute wrongly: one bit of a gradient, NaN, infinity, overflow; and ranks that are slow or stopped."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import runs
import torch
from core import Injection, Row, hold, one_line
from hurt import BAD, fail_at

from hpc_lbsgd.parallel.fixed_point import FixedPoint
from hpc_lbsgd.records import read_metrics

STEPS = 18


def _ended(job, seconds: float, moment: str) -> float:
    begun = time.monotonic()
    ended = job.wait(seconds)
    job.end()
    hold(ended, f"{moment}: no end within {seconds} s", job.said)
    return time.monotonic() - begun


def gradient(rng: random.Random, folder: Path) -> Iterator[Injection]:
    """Every step is cross-checked here. The bit is one that counts: the worker's value is rounded to fixed point."""
    path, run = runs.recipe(folder, machine={"cross_check_steps": 1}, train={"max_steps": STEPS}), folder / "run"
    ranks = 3
    step = rng.randrange(2, STEPS)
    # worker step % busy is compared, of rank worker % 3, by the next rank
    tail = step % 6 == 5
    worker = step % (3 if tail else 4)
    rank, bit = worker % ranks, rng.randrange(22, 30)
    place = rng.randrange(4)
    plain = FixedPoint.add

    def wrong(self, index, keep, digest, apart):
        import hurt

        compared = digest is not None and not apart  # the worker whose turn it is
        if hurt.fault.step == step and compared and index == 0 and not getattr(self, "hurt", False):
            self.hurt = True
            values = self.flats[index][self.layouts[index].statistics :]
            values.view(torch.int32)[place] ^= 1 << bit
        plain(self, index, keep, digest, apart)

    def before(number):
        if number == rank:
            FixedPoint.add = wrong

    moment = f"bit {bit} of a gradient, worker of rank {rank} of {ranks}, step {step}"
    job = runs.train(ranks, path, run, before=before)
    took = _ended(job, 60, moment)
    records = list(read_metrics(run / "metrics.jsonl"))
    events = [r for r in records if r.get("event") == "cross-check"]
    hold(len(events) == 1, f"{moment}: {events}", job.said)
    what = events[0]["what"]
    hold(what.startswith(f"rank {rank} on") and "; computed again it was right" in what, f"{moment}: {what}")
    taken = [r["step"] for r in records if r["kind"] == "step"]
    hold(taken == list(range(events[0]["step"])), f"{moment}: step taken: {taken}")
    hold(runs.status(run)["status"] == "failed", moment)
    yield Injection(moment, events[0]["what"][:160], round(took, 2), 0, one_line(job.said))


def bad(rng: random.Random, folder: Path) -> Iterator[Injection]:
    policy, kind, ranks = rng.choice(["stop", "skip"]), rng.choice(sorted(BAD)), rng.randint(2, 4)
    path = runs.recipe(folder, train={"on_bad_step": policy, "max_steps": STEPS}, machine={"cross_check_steps": 0})
    run, rank, step = folder / "run", rng.randrange(min(ranks, 3)), rng.randrange(STEPS)
    moment = f"{kind} on rank {rank} of {ranks}, step {step}, on_bad_step {policy}"
    job = runs.train(ranks, path, run, env=fail_at(rank, step, kind))
    took = _ended(job, 60, moment)
    records = list(read_metrics(run / "metrics.jsonl"))
    events = [r for r in records if r.get("event") in ("skipped", "non-finite")]
    hold(len(events) == 1, f"{moment}: {events}", job.said)
    (event,) = events
    hold(event["rank"] == rank and event["event"] == {"stop": "non-finite", "skip": "skipped"}[policy], f"{event}")
    status = runs.status(run)
    if policy == "skip":
        hold(status["status"] == "done", f"{moment}: {status}")
        skipped = [r["step"] for r in records if r["kind"] == "step" and r.get("skipped")]
        hold(skipped == [event["step"]], f"{moment}: {skipped}")
        runs.whole(run, STEPS)
    else:
        hold(status["status"] == "failed" and f"rank {rank} on" in status["error"], f"{moment}: {status}")
        hold(set(job.codes.values()) == {1}, f"{moment}: {job.codes}")
    yield Injection(moment, f"event {event['event']} of step {event['step']}", round(took, 2), 0, one_line(job.said))


def slow(rng: random.Random, folder: Path) -> Iterator[Injection]:
    """A rank that takes ten times as long and more; the others' weights and its own are the undisturbed run's."""
    ranks, path, run = rng.randint(2, 3), runs.recipe(folder), folder / "run"
    rank, step = rng.randrange(ranks), rng.randrange(1, 8)
    moment = f"rank {rank} of {ranks} slow from step {step} on"
    job = runs.train(ranks, path, run, env=fail_at(rank, step, "slow", seconds=0.05))
    took = _ended(job, 90, moment)
    events = [r for r in read_metrics(run / "metrics.jsonl") if r.get("event") == "slow"]
    hold([e["rank"] for e in events] == [rank] and events[0]["host"], f"{moment}: {events}", job.said)
    hold(events[0]["step"] - step <= 20, f"{moment}: told at step {events[0]['step']}")
    hold(f"slow: step {events[0]['step']}, rank {rank}, host" in job.said, job.said)
    hold(runs.ending(run) == runs.reference(), f"{moment}: other weights")
    said = next(line for line in job.said.splitlines() if line.startswith("slow:"))
    yield Injection(moment, f"{events[0]['step'] - step} steps later", round(took, 2), 0, said)


def stopped(rng: random.Random, folder: Path) -> Iterator[Injection]:
    ranks, path, run = rng.randint(2, 4), runs.recipe(folder), folder / "run"
    rank, step, phase = rng.randrange(ranks), rng.randrange(1, 20), rng.choice(["data", "forward", "sum"])
    moment = f"SIGSTOP of rank {rank} of {ranks} in {phase} of step {step}"
    job = runs.train(ranks, path, run, env=fail_at(rank, step, "stop", phase))
    begun = time.monotonic()
    gone = job.wait(60, but=rank)
    took = time.monotonic() - begun
    job.end()
    status = runs.status(run)
    hold(gone, f"{moment}: still there", job.said)
    hold(status.get("status") == "failed" and status.get("crashed"), f"{moment}: {status}", job.said)
    hold(f"rank {rank} on" in status["error"] and "no heartbeat" in status["error"], f"{moment}: {status}")
    done = runs.last_step(run)
    yield Injection(moment, "watchdog", round(took, 2), done - runs.checkpointed(run), one_line(job.said))
    digest = runs.finished(rng.randint(1, 3), path, run, "--resume")
    hold(digest == runs.reference(), f"{moment}: other weights after the resume")
    runs.whole(run)


ROWS = [
    Row("gradient-bit", "one bit of a gradient of one worker, cross-check on", "rank named, step not taken", 50,
        gradient, ranks=True, cost_s=7),
    Row("bad-step", "NaN, infinity or overflow on one rank", "`stop` or `skip` as the recipe says; rank on record", 40,
        bad, ranks=True, cost_s=8),
    Row("slow-rank", "a rank ten times as slow", "rank and host told within 20 steps; the weights are the same", 20,
        slow, ranks=True, cost_s=13),
    Row("stopped-rank", "a rank stopped (SIGSTOP), as by a dead node", "named, ended; resumed to the same weights", 40,
        stopped, ranks=True, cost_s=12),
]  # fmt: skip
