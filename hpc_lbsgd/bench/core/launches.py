"""Launches of a benchmark: one mpirun a contender and round, contenders in turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from hpc_lbsgd.bench.core.turns import rotated
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel.launchers import Layout, compose, exported
from hpc_lbsgd.parallel.refusals import refusal
from hpc_lbsgd.progress import note, running

OURS = ("HOROVOD_", "OMPI_MCA_", "GLOO_")  # prefixes of settings that belong to a contender, not to the caller
NETWORK = ("_if_exclude", "_if_include", "_IFNAME")  # endings of those that say which network there is


class Contender(NamedTuple):
    """What is compared: a name, the settings it is started with, and what its program is told.

    settings None: nothing is set or taken out, the caller's environment is part of what is measured.
    """

    name: str
    settings: dict[str, str] | None
    task: dict
    ranks: int


class Place(NamedTuple):
    """Where launches run. folder: for results, seen by the hosts (default: a temporary one, on this host)."""

    hosts: str | None = None
    hostfile: str | None = None
    mpi: str | None = None  # flavour that mpirun must be
    folder: Path | None = None


HERE = Place()


def environment(contender: Contender) -> dict[str, str]:
    """The caller's environment without settings of the engines, so that `as shipped` is as shipped."""
    if contender.settings is None:
        return dict(os.environ)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OURS) or k.endswith(NETWORK)}
    return kept | contender.settings


def run(program: str, contender: Contender, timeout_s: float, oversubscribe: bool, place: Place = HERE) -> dict:
    """One launch of `python -m PROGRAM TASK OUT`; returns what rank 0 wrote.

    Raises RequestError where mpirun can start nothing there, else RunError that names the contender.
    """
    with tempfile.TemporaryDirectory(dir=place.folder, prefix=".launch-") as folder:
        out = Path(folder).absolute() / "result.json"
        words = [sys.executable, "-m", program, json.dumps(contender.task), str(out)]
        layout = Layout(contender.ranks, place.hosts, place.hostfile, oversubscribe)
        own = environment(contender)
        line = compose(layout, exported(layout, own), words, place.mpi)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running(line)
        # Ctrl-C is ours: an mpirun that hears it beside our SIGTERM leaves its ranks behind
        process = subprocess.Popen(line, env=own, **pipes, text=True, start_new_session=True)
        with ending(process):
            try:
                said, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.terminate()
                said, _ = process.communicate()
                said = f"no result after {timeout_s:g} s; its last words: {tail(said)}"
                raise RunError(f"{contender.name}: {said}") from None
        if process.returncode or not out.exists():
            problem = refusal(said, layout, place.mpi)
            if problem:
                raise RequestError(problem)
            raise RunError(f"{contender.name}: {Path(line[0]).name} ended with {process.returncode}: {tail(said)}")
        return json.loads(out.read_text())


@contextmanager
def ending(process: subprocess.Popen) -> Iterator[None]:
    """What ends this process, Ctrl-C or SIGTERM, ends mpirun first, and mpirun its ranks."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate()
        signal.signal(signal.SIGTERM, before)


def tail(text: str, lines: int = 5) -> str:
    return " | ".join(line for line in text.strip().splitlines()[-lines:] if line.strip()) or "nothing"


def check_file(flag: str, path: Path) -> None:
    """Refuse a file that could not be written when all launches are over."""
    if path.is_dir() or not path.parent.is_dir():
        raise RequestError(f"{flag} {path}: " + ("a folder" if path.is_dir() else f"no folder {path.parent}"))


class Progress:
    """Says on stderr which launch begins, and when the last one will end at the pace so far."""

    def __init__(self, launches: int):
        self.launches, self.begun, self.since = launches, 0, time.monotonic()

    def expect(self, left: int) -> None:
        """So many launches are still to begin."""
        self.launches = self.begun + left

    def begin(self, text: str) -> None:
        if self.begun:
            left = (time.monotonic() - self.since) / self.begun * (self.launches - self.begun)
            text += f", ETA {timedelta(seconds=round(max(0.0, left)))}"
        note(text)
        self.begun += 1


def in_turn(
    program: str, contenders: list[Contender], rounds: int, timeout_s: float, oversubscribe: bool,
    progress: Progress | None = None, place: Place = HERE,
) -> Iterator[tuple[Contender, dict]]:  # fmt: skip
    """Every contender once a round; each round starts with another.

    progress: of more launches than these.
    """
    progress = progress or Progress(rounds * len(contenders))
    for r in range(rounds):
        for contender in rotated(contenders, r):
            progress.begin(f"round {r + 1} of {rounds}: {contender.name}")
            yield contender, run(program, contender, timeout_s, oversubscribe, place)
