"""What a command says on stderr beside its result and its errors: bars and lines of progress.

-q, --quiet      none of it: warnings, errors, and what happens to a run (a step passed over, a slow rank) alone
-v, --verbose    all of it, the command lines that are run, and where an error was raised

They are kept in the environment, which ranks inherit. The result on stdout is the same. Bars and pages have no
colours beyond the terminal's own, and NO_COLOR (no-color.org) is heeded by all that might have.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence

SAY = "HPC_LBSGD_SAY"
QUIET, VERBOSE = "quiet", "verbose"


def quiet() -> bool:
    return os.environ.get(SAY) == QUIET


def verbose() -> bool:
    return os.environ.get(SAY) == VERBOSE


def note(text: str) -> None:
    """A line of progress."""
    if not quiet():
        print(text, file=sys.stderr, flush=True)


def running(line: Sequence[str]) -> None:
    """A command line, as it is run."""
    if verbose():
        print(f"+ {shlex.join(line)}", file=sys.stderr, flush=True)


def raised(problem: BaseException) -> None:
    """Where an error came from, before the line that says what it is."""
    if verbose():
        traceback.print_exception(problem)


def bar(iterable: Iterable | None = None, show: bool = True, **how):
    """tqdm's, on a terminal alone, as wide as that is at each moment. show: False on all ranks but one."""
    from tqdm import tqdm

    return tqdm(iterable, disable=None if show and not quiet() else True, dynamic_ncols=True, **how)
