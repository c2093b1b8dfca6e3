"""Arguments that several commands take, and what may be in them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from hpc_lbsgd.progress import QUIET, VERBOSE
from hpc_lbsgd.runs import RESUME, RESUME_IF_EXISTS


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def counts(text: str) -> list[int]:
    if not all(word.isdigit() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers, such as 1,44")
    return [positive(word) for word in text.split(",")]


def nodes_sweep(text: str) -> list[int]:
    key, _, values = text.partition("=")
    if key != "nodes":
        raise argparse.ArgumentTypeError(f"{text}: expected nodes=A,B, such as nodes=1,2,4")
    return sorted(set(counts(values)))


def byte_count(text: str) -> int:
    number = text.upper().removesuffix("B")
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(number[-1:], 1)
    count = number.rstrip("KMG")
    if not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: expected a size, such as 64KB, 4MB or 1000")
    return positive(count) * factor


def byte_counts(text: str) -> list[int]:
    return [byte_count(word) for word in text.split(",")]


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be negative")
    return value


def quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 95:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 to 95")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def step_range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text}: expected A:B, such as 0:10")
    return int(first), int(last)


def add_command(commands, name: str, *, help: str, example: str | None = None) -> argparse.ArgumentParser:
    """A command whose line in the list of its parent heads its own page too. example: words after hpc-lbsgd."""
    epilog = f"Example: hpc-lbsgd {example}" if example else None
    p = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=epilog)
    with_say(p)
    return p


def with_say(p):
    """Before a command and behind it, see progress.py."""
    how = p.add_mutually_exclusive_group()
    for flag, value, what in (
        ("quiet", QUIET, "results, warnings and errors alone: no progress"),
        ("verbose", VERBOSE, "also the command lines that are run, and where an error was raised"),
    ):
        how.add_argument(f"-{flag[0]}", f"--{flag}", dest="say", action="store_const", const=value,
                         default=argparse.SUPPRESS, help=what)  # fmt: skip


def with_json(p):
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else there")
    return p


def with_set(p):
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="change a recipe key, such as optim.base_lr=0.2; may be repeated",
    )


def with_launches(p):
    p.add_argument("--ranks", type=positive, default=2, help="ranks (default: %(default)s)")
    p.add_argument("--rounds", type=positive, default=5, help="launches of each, in turn (default: %(default)s)")
    p.add_argument(
        "--timeout-s", type=positive_float, default=600.0, help="seconds for one launch (default: %(default)g)"
    )
    p.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw it too (PNG, SVG or PDF)")


def with_hosts(p, flavours: Iterable[str]):
    where = p.add_mutually_exclusive_group()
    where.add_argument("--hosts", help="hosts with their slots: a:8,b:8")
    where.add_argument("--hostfile", help="file of hosts, as mpirun takes it")
    p.add_argument("--mpi", choices=list(flavours), help="flavour (default: what mpirun says it is)")
    p.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores")


def with_recipe(p, what: str = "a recipe file, or the name of a shipped recipe"):
    p.add_argument("recipe", help=what)
    with_set(p)


def with_run(p):
    p.add_argument("--run", help="run folder (default: runs/RECIPE-TIME; with --resume the newest of this recipe)")
    flags = p.add_mutually_exclusive_group()
    for flag, what in (
        (RESUME, "go on from the run's newest good checkpoint; refused where no run is"),
        (RESUME_IF_EXISTS, "the same if there is a run in --run, else start it: for batch scripts"),
    ):
        flags.add_argument(flag, dest="resume", action="store_const", const=flag, help=what)
    with_amend(p, "--resume: ")


def with_amend(p, when: str = ""):
    p.add_argument(
        "--amend",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"{when}change a key from here on (learning rate, milestones ahead, epochs, scales); journaled",
    )
