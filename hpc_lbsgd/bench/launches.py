"""Launches of a benchmark: one mpirun a contender and round, contenders in turn, so that a machine whose speed drifts
treats all alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel.launchers import Layout, compose

OURS = ("HOROVOD_", "OMPI_MCA_", "GLOO_")  # prefixes of settings that belong to a contender, not to the caller


class Contender(NamedTuple):
    """What is compared: a name, the settings it is started with, and what its program is told."""

    name: str
    settings: dict[str, str]
    task: dict
    ranks: int


def environment(contender: Contender) -> dict[str, str]:
    """The caller's environment without settings of the engines, so that `as shipped` is as shipped."""
    return {k: v for k, v in os.environ.items() if not k.startswith(OURS)} | contender.settings


def run(program: str, contender: Contender, timeout_s: float, oversubscribe: bool) -> dict:
    """One launch of `python -m PROGRAM TASK OUT`; returns what rank 0 wrote.

    Raises RunError that names the contender.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [sys.executable, "-m", program, json.dumps(contender.task), str(out)]
        line = compose(Layout(contender.ranks, oversubscribe=oversubscribe), {}, words)
        process = subprocess.Popen(
            line, env=environment(contender), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpirun ends its ranks
            said, _ = process.communicate()
            raise RunError(f"{contender.name}: no result after {timeout_s:g} s; its last words: {tail(said)}") from None
        if process.returncode or not out.exists():
            raise RunError(f"{contender.name}: mpirun ended with {process.returncode}: {tail(said)}")
        return json.loads(out.read_text())


def tail(text: str, lines: int = 5) -> str:
    return " | ".join(line for line in text.strip().splitlines()[-lines:] if line.strip()) or "nothing"


def in_turn(
    program: str, contenders: list[Contender], rounds: int, timeout_s: float, oversubscribe: bool
) -> Iterator[tuple[Contender, dict]]:
    """Every contender once a round; each round starts with another. Progress goes to stderr."""
    for r in range(rounds):
        order = contenders[r % len(contenders) :] + contenders[: r % len(contenders)]
        for contender in order:
            print(f"round {r + 1} of {rounds}: {contender.name}", file=sys.stderr, flush=True)
            yield contender, run(program, contender, timeout_s, oversubscribe)
