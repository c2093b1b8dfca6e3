"""Checkpoints on disks that fail: at each call that changes the disk, in process; and under real ranks."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs
import saves
import spaces
from core import Injection, Row, hold, one_line
from hurt import fail_at

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.writer import Writer

ERRORS = {"disk-full": errno.ENOSPC, "read-only": errno.EROFS, "io-error": errno.EIO}
LIMIT_S = 0.04
END_S = 30.0


def _failing(number: int) -> Callable[[str], None]:
    def fail(_: str) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def boundaries(fault: str) -> Callable[[random.Random, Path], Iterator[Injection]]:
    """Every boundary of every kind of save, one after the other."""

    def run(rng: random.Random, folder: Path) -> Iterator[Injection]:
        for kind in saves.KINDS:
            for number, place, good in saves.copies(folder / kind, kind):
                lasting = fault == "killed" or rng.random() < 0.5
                hit = (lambda n, at=number: n >= at) if lasting else number.__eq__
                act = saves.die if fault == "killed" else _failing(ERRORS[fault])
                said, begun = "", time.monotonic()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(os, "fsync", lambda _: None)
                    patch.setattr(threading, "excepthook", lambda _: None)
                    calls = saves.Calls(patch, hit, act)
                    try:
                        with contextlib.suppress(saves.Killed):
                            saves.act(place, kind)
                    except RunError as problem:
                        said = str(problem)
                if len(calls.names) < number:  # there are no more
                    break
                where = f"{fault} at call {number} ({calls.names[number - 1]}) of a save, {saves.KINDS[kind]}"
                if said and fault != "killed":
                    wanted = saves.HINTS[ERRORS[fault]]
                    hold(wanted in said and "start again with --resume" in said, f"{where}: {said}")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(os, "fsync", lambda _: None)
                    step = saves.check(place, good, saves.LAST[kind])
                yield Injection(where, f"step {step} loads", time.monotonic() - begun, saves.LAST[kind] - step, said)

    return run


def slow(rng: random.Random, folder: Path) -> Iterator[Injection]:
    """One call of a save takes long: told where it takes longer than the limit, and whole in the end."""
    for number, place, _ in saves.copies(folder, "next"):
        limit_s, told, heard = rng.choice([LIMIT_S, 60.0]), [], threading.Event()
        wait_s = 30.0 if limit_s == LIMIT_S else LIMIT_S

        def say(message: str, told=told, heard=heard) -> None:
            told.append(message)
            heard.set()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)
            calls = saves.Calls(patch, number.__eq__, lambda _, heard=heard, wait_s=wait_s: heard.wait(wait_s))
            writer = Writer(place, 2, limit_s, say)
            writer.save(saves.replica(2), checkpoint.State(2, "recipe", "data"))
            writer.wait()
        if len(calls.names) < number:
            break
        where = f"call {number} ({calls.names[number - 1]}) takes longer than {LIMIT_S} s, the limit is {limit_s} s"
        hold(len(told) == (limit_s == LIMIT_S), f"{where}: {told}")
        hold(checkpoint.find_newest(place)[1].step == 2, where)
        yield Injection(where, "told" if told else "no word", LIMIT_S, 0, "".join(told))


# ---------------------------------------------------------------- under real ranks


class Strike:
    """In rank 0's process: from a call on of a save on, in the writing thread, the disk does not do its work."""

    def __init__(self, fault: str, step: int, call: int, mark: Path):
        self.fault, self.step, self.call, self.mark, self.count = fault, step, call, mark, 0

    def __call__(self, rank: int) -> None:
        if rank:
            return
        plain = checkpoint.write

        def write(folder, snapshot, keep):
            if snapshot.state.step < self.step or self.mark.exists():
                return plain(folder, snapshot, keep)
            with pytest.MonkeyPatch.context() as patch:
                saves.Calls(patch, self.here, self.act)
                return plain(folder, snapshot, keep)

        checkpoint.write = write

    def here(self, _: int) -> bool:
        """Other threads write too, and that is none of this fault's."""
        if threading.current_thread().name != "checkpoint":
            return False
        self.count += 1
        return self.count >= self.call if self.fault != "slow" else self.count == self.call

    def act(self, _: str) -> None:
        self.mark.touch()
        if self.fault == "slow":
            time.sleep(1.5)
        elif self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            _failing(ERRORS[self.fault])("")


def with_ranks(rng: random.Random, folder: Path) -> Iterator[Injection]:
    path, run = runs.recipe(folder), folder / "run"
    ranks, fault = rng.randint(1, 3), rng.choice(["killed", "slow", *ERRORS])
    step, mark = 3 * rng.randint(1, 9), folder / "mark"
    strike = Strike(fault, step, rng.randint(1, 24), mark)  # a save has more calls than that
    moment = f"{fault} from call {strike.call} of the checkpoint of step {step} on, {ranks} ranks"
    job = runs.train(ranks, path, run, before=strike)
    hold(job.wait_for(mark.exists, 60), f"{moment}: it did not happen", job.said)
    begun = time.monotonic()
    gone = job.wait(END_S)
    took = time.monotonic() - begun
    job.end()
    hold(gone, f"{moment}: ranks were there after {END_S} s", job.said)
    lost = runs.last_step(run) - runs.checkpointed(run)
    if fault == "slow":
        hold(set(job.codes.values()) == {0}, f"{moment}: {job.codes}", job.said)
    else:
        hold(any(job.codes.values()), f"{moment}: {job.codes}", job.said)
        if fault != "killed":
            said = one_line(job.said)
            hold("checkpoint at step" in said and saves.HINTS[ERRORS[fault]] in said, f"{moment}: {said}", job.said)
        if fault != "killed" or ranks > 1:
            hold(runs.status(run).get("status") == "failed", f"{moment}: {runs.status(run)}", job.said)
        runs.finished(rng.randint(1, 4), path, run, "--resume-if-exists")
    hold(runs.ending(run) == runs.reference(), f"{moment}: other weights")
    runs.whole(run)
    yield Injection(moment, "ended" if fault != "slow" else "went on", round(took, 2), lost, one_line(job.said))


def real(rng: random.Random, folder: Path) -> Iterator[Injection]:
    """Not by injected calls: a disk of 4 MB that is filled, or one that is made read-only."""
    ranks, fault, step = rng.randint(1, 3), rng.choice(["disk-full", "read-only"]), rng.randint(1, runs.STEPS - 8)
    path, disk, mark, go = runs.recipe(folder), folder / "disk", folder / "mark", folder / "go"
    disk.mkdir()
    spaces.mount("none", disk, "tmpfs", options="size=4m")
    run = disk / "run"
    moment = f"{fault} at step {step}, {ranks} ranks"
    env = fail_at(rng.randrange(ranks), step, "wait", mark=str(mark), go=str(go))
    job = runs.train(ranks, path, run, env=env)
    hold(job.wait_for(mark.exists, 60), f"{moment}: it did not happen", job.said)
    time.sleep(0.1)  # a write that is under way ends
    saved = run / "checkpoints"
    saved.mkdir(exist_ok=True)
    if fault == "disk-full":
        fill(disk / "ballast")
    else:
        spaces.mount(saved, saved, flags=spaces.BIND)
        spaces.mount("none", saved, flags=spaces.BIND | spaces.REMOUNT | spaces.READ_ONLY)
    go.touch()
    begun = time.monotonic()
    gone = job.wait(END_S)
    took = time.monotonic() - begun
    job.end()
    hold(gone, f"{moment}: ranks were there after {END_S} s", job.said)
    said = one_line(job.said)
    wanted = "make room" if fault == "disk-full" else "make the folder writable"
    hold(any(job.codes.values()) and wanted in said, f"{moment}: {job.codes} {said}", job.said)
    hold((run / "metrics.jsonl").read_bytes().endswith((b"}\n", b"")), f"{moment}: half a record")
    lost = runs.last_step(run) - runs.checkpointed(run)
    if fault == "disk-full":
        (disk / "ballast").unlink()
    else:
        spaces.unmount(saved)
    digest = runs.finished(rng.randint(1, 4), path, run, "--resume-if-exists")
    hold(digest == runs.reference(), f"{moment}: other weights")
    runs.whole(run)
    spaces.unmount(disk)
    yield Injection(moment, "ended", round(took, 2), lost, said)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as ballast:
        for size in (65536, 4096, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(b"0" * size)


def _row(fault: str, what: str) -> Row:
    return Row(f"save-{fault}", what, "the last good one loads; the message says what to do", 150, boundaries(fault),
               cost_s=0.03)  # fmt: skip


ROWS = [
    _row("killed", "a save that is killed, at each call that changes the disk"),
    _row("disk-full", "each call of a save: no space left"),
    _row("read-only", "each call of a save: a read-only file system"),
    _row("io-error", "each call of a save: an I/O error"),
    Row("save-slow", "each call of a save takes long", "told where it passes the limit; whole in the end", 40, slow,
        cost_s=0.15),
    Row("save-ranks", "the same under real ranks, at a random call of a random checkpoint",
        "all ranks end within 30 s and say what to do; resumed on another number of ranks to the same weights", 40,
        with_ranks, ranks=True, cost_s=3.5),
    Row("save-disk", "a real disk is full, or made read-only, in mid-run", "the same", 20, real, ranks=True, cost_s=4,
        why_not=spaces.why_not),
]  # fmt: skip
