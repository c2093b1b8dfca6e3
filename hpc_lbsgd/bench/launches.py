"""Launches of a benchmark: one mpirun a contender and round, contenders in turn, so that a machine whose speed drifts
treats all alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel.launchers import Layout, compose, exported

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

    oversubscribe: bool = False
    hosts: str | None = None
    hostfile: str | None = None
    mpi: str | None = None  # flavour that mpirun must be
    folder: Path | None = None


def environment(contender: Contender) -> dict[str, str]:
    """The caller's environment without settings of the engines, so that `as shipped` is as shipped."""
    if contender.settings is None:
        return dict(os.environ)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(OURS) or k.endswith(NETWORK)}
    return kept | contender.settings


def run(program: str, contender: Contender, timeout_s: float, place: Place) -> dict:
    """One launch of `python -m PROGRAM TASK OUT`; returns what rank 0 wrote.

    Raises RunError that names the contender.
    """
    with tempfile.TemporaryDirectory(dir=place.folder, prefix=".launch-") as folder:
        out = Path(folder).absolute() / "result.json"
        words = [sys.executable, "-m", program, json.dumps(contender.task), str(out)]
        layout = Layout(contender.ranks, place.hosts, place.hostfile, place.oversubscribe)
        own = environment(contender)
        line = compose(layout, exported(layout, own), words, place.mpi)
        process = subprocess.Popen(line, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun ends its ranks
            said, _ = process.communicate()
            raise RunError(f"{contender.name}: no result after {timeout_s:g} s; its last words: {tail(said)}") from None
        if process.returncode or not out.exists():
            raise RunError(f"{contender.name}: {Path(line[0]).name} ended with {process.returncode}: {tail(said)}")
        return json.loads(out.read_text())


def tail(text: str, lines: int = 5) -> str:
    return " | ".join(line for line in text.strip().splitlines()[-lines:] if line.strip()) or "nothing"


def in_turn(
    program: str, contenders: list[Contender], rounds: int, timeout_s: float, place: Place
) -> Iterator[tuple[Contender, dict]]:
    """Every contender once a round; each round starts with another. Progress goes to stderr."""
    started, done, total = time.monotonic(), 0, rounds * len(contenders)
    for r in range(rounds):
        order = contenders[r % len(contenders) :] + contenders[: r % len(contenders)]
        for contender in order:
            left = (time.monotonic() - started) / done * (total - done) if done else None
            soon = f", about {left:.0f} s left" if left else ""
            print(f"round {r + 1} of {rounds}: {contender.name}{soon}", file=sys.stderr, flush=True)
            yield contender, run(program, contender, timeout_s, place)
            done += 1
