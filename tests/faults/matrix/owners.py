"""Two starts and more on one run folder: exactly one goes on, and it ends as if it had been alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import runs
from core import Injection, Row, hold
from forked import Job
from hurt import fail_at

from hpc_lbsgd import owner

WAYS = ("same time", "during a save", "at the end", "after a crash", "delays")


class Delays:
    """In a rank's process: the lease's calls take their time, an answer is lost now and then, and what another client
    made is not seen at once: as NFS has it."""

    def __init__(self, seed: float):
        self.rng, self.mine = random.Random(seed), set()

    def __call__(self, rank: int) -> None:
        self.rng.seed(f"{self.rng.random()} {os.getpid()}")
        for name, lost in (("link", FileExistsError), ("unlink", None), ("replace", None)):
            setattr(os, name, self._slowly(getattr(os, name), lost))
        owner.open = self._open

    def _slowly(self, function, lost):
        def call(*words, **more):
            paths = [os.fspath(word) for word in words if isinstance(word, (str, os.PathLike))]
            if not any("owner" in path for path in paths):
                return function(*words, **more)
            time.sleep(self.rng.random() * 0.02)
            found = function(*words, **more)
            self.mine |= set(paths)
            time.sleep(self.rng.random() * 0.02)
            if lost and self.rng.random() < 0.3:  # it was done, and is asked for again
                raise lost(17, "File exists")
            return found

        return call

    def _open(self, path, mode="r", **more):
        time.sleep(self.rng.random() * 0.01)
        if mode == "r" and os.fspath(path) not in self.mine and self.rng.random() < 0.3:
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        if mode != "r":
            self.mine.add(os.fspath(path))
        return open(path, mode, **more)


def _ended(job: Job, moment: str) -> int:
    """One code for all ranks: 0 or 2."""
    ended = job.wait(60)
    job.end()
    hold(ended, f"{moment}: no end: {job.codes}", job.said)
    codes = set(job.codes.values())
    hold(len(codes) == 1 and codes <= {0, 2}, f"{moment}: {job.codes}", job.said)
    (code,) = codes
    if code == 2:
        hold("in use by" in job.said and "Traceback" not in job.said, f"{moment}: refused otherwise", job.said)
    return code


def _files(run: Path) -> dict:
    """What no second start may touch."""
    kept = (p for p in run.rglob("*") if p.is_file() and p.parent.name != "heartbeats")
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in kept}


def one(rng: random.Random, folder: Path) -> Iterator[Injection]:
    for way in rng.sample(WAYS, len(WAYS)):
        place = folder / way.replace(" ", "-")
        place.mkdir()
        yield ACTS[way](rng, place, runs.recipe(place), place / "run")


def _start(rng: random.Random, path: Path, run: Path, env: dict, **job) -> Job:
    return runs.train(rng.randint(1, 2), path, run, "--resume-if-exists", env=env, **job)


def _race(rng: random.Random, place: Path, path: Path, run: Path, moment: str, **more) -> Injection:
    """Starts at the same time. Who goes on waits at some step until the others were refused."""
    mark, go, count = place / "mark", place / "go", rng.randint(2, 3)
    first = runs.checkpointed(run)
    env = fail_at(0, rng.randint(first, max(first, runs.STEPS - 2)), "wait", mark=str(mark), go=str(go))
    begun = time.monotonic()
    starts = [_start(rng, path, run, env, **more) for _ in range(count)]
    while sum(job.poll() for job in starts) < count - 1 and time.monotonic() < begun + 60:
        time.sleep(0.01)
    took = time.monotonic() - begun
    hold(mark.exists() or sum(job.poll() for job in starts) < count, f"{moment}: nobody", *(j.said for j in starts))
    go.touch()
    codes = [_ended(job, moment) for job in starts]
    hold(sorted(codes) == [0] + [2] * (count - 1), f"{moment}: {codes}", *(job.said for job in starts))
    _alone(run, moment)
    said = starts[codes.index(2)].said.splitlines()[0].removeprefix("hpc-lbsgd: ")
    return Injection(f"{moment}, {count} starts", "one goes on, the others are refused", round(took, 2), 0, said)


def _alone(run: Path, moment: str) -> None:
    hold(runs.ending(run) == runs.reference(), f"{moment}: other weights")
    runs.whole(run)
    hold(runs.status(run)["status"] == "done" and not (run / "owner.json").exists(), f"{moment}: {runs.status(run)}")


def same_time(rng: random.Random, place: Path, path: Path, run: Path) -> Injection:
    return _race(rng, place, path, run, "same time")


def delays(rng: random.Random, place: Path, path: Path, run: Path) -> Injection:
    """On a new folder, or on one whose owner is dead."""
    crashed = rng.random() < 0.5
    if crashed:
        _crash(rng, place, path, run)
    slow = Delays(rng.random())
    return _race(rng, place, path, run, f"delays as of NFS{', after a crash' if crashed else ''}", before=slow)


def _crash(rng: random.Random, place: Path, path: Path, run: Path) -> None:
    """All ranks are killed at some step."""
    mark = place / "crash"
    env = fail_at(0, rng.randint(1, 20), "wait", mark=str(mark), go=str(place / "never"))
    job = _start(rng, path, run, env)
    hold(job.wait_for(mark.exists, 60), "it did not begin", job.said)
    for pid in job.pids:
        os.kill(pid, signal.SIGKILL)
    job.wait(10)
    job.end()
    hold((run / "owner.json").exists(), "no lease was left")


def after_a_crash(rng: random.Random, place: Path, path: Path, run: Path) -> Injection:
    _crash(rng, place, path, run)
    return _race(rng, place, path, run, "after a crash")


def during_a_save(rng: random.Random, place: Path, path: Path, run: Path) -> Injection:
    mark, go = place / "mark", place / "go"
    step = rng.randint(0, runs.STEPS - 4)
    env = fail_at(0, step, "wait", "checkpoint", mark=str(mark), go=str(go))
    first = _start(rng, path, run, env)
    moment = f"during a save after step {step}"
    hold(first.wait_for(mark.exists, 60), f"{moment}: it did not happen", first.said)
    time.sleep(0.2)  # steps that go on beside the write
    before, begun = _files(run), time.monotonic()
    second = _start(rng, path, run, {})
    code = _ended(second, moment)
    took = time.monotonic() - begun
    hold(code == 2, f"{moment}: the second start had {code}", second.said)
    after = _files(run)
    changed = {p for p in before if after.get(p) != before[p] and not p.endswith(("metrics.jsonl", "owner.json"))}
    changed = {p for p in changed if "tensorboard" not in p}
    hold(not changed, f"{moment}: the second start changed {changed}")
    go.touch()
    hold(_ended(first, moment) == 0, f"{moment}: the first", first.said)
    _alone(run, moment)
    return Injection(moment, "the second is refused, the first goes on", round(took, 2), 0,
                     second.said.splitlines()[0].removeprefix("hpc-lbsgd: "))  # fmt: skip


def at_the_end(rng: random.Random, place: Path, path: Path, run: Path) -> Injection:
    """The second comes about when the first leaves: it is refused, or finds nothing left to do."""
    first = _start(rng, path, run, {})
    when = rng.choice(["end", "done"])

    def is_near() -> bool:
        if when == "done":
            return (run / "status.json").exists()
        return (run / "metrics.jsonl").exists() and '"kind": "end"' in (run / "metrics.jsonl").read_text()

    hold(first.wait_for(is_near, 60), "no end", first.said)
    delay_s = rng.random() * 0.3
    time.sleep(delay_s)
    moment = f"{delay_s:.3f} s after {'status.json' if when == 'done' else 'the last record'}"
    begun = time.monotonic()
    second = _start(rng, path, run, {})
    codes = [_ended(first, moment), _ended(second, moment)]
    hold(codes[0] == 0, f"{moment}: {codes}", first.said, second.said)
    _alone(run, moment)
    return Injection(moment, "refused" if codes[1] else "nothing left to do", round(time.monotonic() - begun, 2), 0)


ACTS = {
    "same time": same_time,
    "during a save": during_a_save,
    "at the end": at_the_end,
    "after a crash": after_a_crash,
    "delays": delays,
}
ROWS = [
    Row("two-owners", "two or three starts on one run folder: at the same time, during a save, at the end, after a "
        "crash, over delays as NFS has them", "exactly one goes on, to the same weights; the others are refused, and "
        "change nothing", 60, one, ranks=True, cost_s=4)
]  # fmt: skip
