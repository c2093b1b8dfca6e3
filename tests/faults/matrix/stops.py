"""Signals and terminals: a run stops at a safe point, or ends at once, as docs/runs.md says; nothing is left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import runs
import spaces
from core import Injection, Row, hold, one_line
from forked import Job
from hurt import PHASES, fail_at

ROOT = Path(__file__).resolve().parents[3]
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGUSR1": signal.SIGUSR1, "SIGUSR2": signal.SIGUSR2,
           "SIGHUP": signal.SIGHUP}  # fmt: skip
END_S = 30.0
PATH = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)])  # of ranks that are not forked


class Stop:
    """One run that is asked to stop by `kind` in some phase, with who it comes to: `train` alone, a rank, `launch`."""

    def __init__(self, kind: str, rng: random.Random, folder: Path):
        self.kind, self.rng, self.folder = kind, rng, folder
        self.path, self.run, self.mark, self.go = (folder / n for n in ("recipe.yaml", "run", "mark", "go"))
        runs.recipe(folder, machine={"stall_timeout_s": 30.0})  # a start by mpirun takes long here
        typed = kind in ("SIGINT twice", "terminal closed")
        self.who = rng.choices(["alone", "rank", "launch"], [4, 0 if typed else 2, 1.5])[0]
        self.terminal = kind == "terminal closed" or ("SIGINT" in kind and self.who != "rank" and rng.random() < 0.5)
        self.ranks = 1 if self.who == "alone" else rng.randint(2, 3) if self.who == "rank" else 2
        self.phase = rng.choice([p for p in PHASES if p != "start" or self.who != "launch"])
        self.step = -1 if self.phase == "start" else rng.randint(0, runs.STEPS - 8)
        self.victim = rng.randrange(self.ranks)
        files = {"mark": str(self.mark), "go": str(self.go)}
        drag = 0.3 * (self.who == "launch")  # it is asked by a file, and is not to end before
        self.env = fail_at(self.victim, self.step, "wait", self.phase, **files, drag=drag)
        to = f"rank {self.victim} of {self.ranks}" if self.who == "rank" else f"`{self.who}`".replace("alone", "train")
        by = " at its terminal" if self.terminal else ""
        self.moment = f"{kind} at {to}{by}, in {self.phase} of step {self.step}"

    def start(self) -> Job:
        if self.who == "launch":
            engine = self.rng.choice(["torch", "horovod"])
            words = ["launch", "--np", self.ranks, "--oversubscribe", "--", "train", self.path, "--run", self.run,
                     "--set", f"machine.engine={engine}"]  # fmt: skip
            self.moment += f", {engine}"
            env = self.env | {"PYTHONPATH": PATH}
            own = spaces.why_not() is None
            return Job(1, words, self.folder, env, terminal=self.terminal, own_shm=own)
        return runs.train(self.ranks, self.path, self.run, env=self.env, terminal=self.terminal)

    def send(self, job: Job) -> None:
        if self.kind == "terminal closed":
            job.hang_up()
        elif "SIGINT" in self.kind and self.terminal:
            job.type(b"\x03")
        else:
            os.kill(job.pids[self.victim if self.who == "rank" else 0], SIGNALS[self.kind.split()[0]])

    def expected(self) -> int:
        """The exit code."""
        early = self.phase == "start" and self.who == "alone" and "SIGINT" in self.kind
        if self.kind == "SIGINT twice" or early:
            return 130
        return 0 if self.who == "rank" else 75


def one(kind: str, rng: random.Random, folder: Path) -> Iterator[Injection]:
    stop = Stop(kind, rng, folder)
    job = stop.start()
    hold(job.wait_for(stop.mark.exists, 90), f"{stop.moment}: it did not happen", job.said)
    shm = open_shm(job) if stop.who == "launch" and not spaces.why_not() else None
    time.sleep(rng.random() * 0.2)  # others go on, up to where they wait
    begun, code = time.monotonic(), stop.expected()
    stop.send(job)
    if kind == "SIGINT twice" and stop.phase != "start":
        hold(job.wait_for(lambda: "again ends at once" in job.said, 30), f"{stop.moment}: no word", job.said)
        if stop.phase == "checkpoint":  # the second one waits for the write
            stop.send(job)
            job.wait_for(lambda: "does not wait for it" in job.said, 5)
            stop.go.touch()
        else:
            stop.send(job)
    elif kind != "SIGINT twice":
        time.sleep(0.05)
        stop.go.touch()
    ended = job.wait(END_S)
    took = time.monotonic() - begun
    hold(ended, f"{stop.moment}: no end within {END_S} s", job.said)
    hold(set(job.codes.values()) == {code}, f"{stop.moment}: {job.codes}, not {code}", job.said)
    hold("Traceback" not in job.said, f"{stop.moment}", job.said)
    nothing_left(job, shm, stop.moment)
    said = one_line(job.said)
    job.end()
    status = runs.status(stop.run)
    lost = 0
    if code == 130:
        if stop.phase == "start":
            hold(not stop.run.exists(), f"{stop.moment}: a folder is left: {list(stop.run.rglob('*'))[:5]}")
        lost = runs.last_step(stop.run) - runs.checkpointed(stop.run)
    else:
        hold(status.get("status") in ("stopped", "done"), f"{stop.moment}: {status}", job.said)
        hold(status["step"] == runs.last_step(stop.run) == runs.checkpointed(stop.run), f"{stop.moment}: {status}")
    digest = runs.finished(rng.randint(1, 3), stop.path, stop.run, "--resume-if-exists")
    hold(digest == runs.reference(), f"{stop.moment}: other weights")
    runs.whole(stop.run)
    yield Injection(stop.moment, "ended at once" if code == 130 else "safe stop", round(took, 2), lost, said)


def open_shm(job: Job) -> int:
    """The job's own /dev/shm: a descriptor keeps it after the job has ended."""
    return os.open(f"/proc/{job.pids[0]}/root/dev/shm", os.O_RDONLY)


def nothing_left(job: Job, shm: int | None, moment: str) -> None:
    end = time.monotonic() + 10
    while (left := job.left()) and time.monotonic() < end:
        time.sleep(0.05)
    hold(not left, f"{moment}: processes are left: {left}", job.said)
    if shm is not None:
        found = os.listdir(shm)
        os.close(shm)
        hold(not found, f"{moment}: shared memory is left: {found}")


def row(kind: str) -> Row:
    def run(rng: random.Random, folder: Path) -> Iterator[Injection]:
        return one(kind, rng, folder)

    must = "at once, exit code 130" if "twice" in kind else "a safe stop, exit code 75, no step lost"
    return Row(f"stop-{kind.replace(' ', '-').lower()}", f"{kind} at `train`, a rank, or `launch` (Horovod, torch)",
               f"{must}; no process and no shared memory left; resumed to the same weights", 20, run, ranks=True,
               cost_s=6)  # fmt: skip


ROWS = [row(kind) for kind in ("SIGTERM", "SIGINT", "SIGINT twice", "SIGUSR1", "SIGUSR2", "SIGHUP", "terminal closed")]
