"""Which run folder a start means, and that it has it alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from glob import escape
from pathlib import Path

from hpc_lbsgd import owner
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.records import RunFolder

RUNS = Path("runs")
TIME = "%Y%m%d-%H%M%S"
LIKE_TIME = "-".join(("[0-9]" * 8, "[0-9]" * 6))

# What a start says about its run; one that says neither makes a new one
RESUME = "--resume"  # the run is there
RESUME_IF_EXISTS = "--resume-if-exists"  # it may be there: for the first start of a batch script, and all later ones


def name_of(recipe: str) -> str:
    """What a recipe is called, by its file's name; that of a run folder is called as the folder."""
    path = Path(recipe)
    of_run = path.name == "recipe.yaml" and RunFolder(path.parent).metrics.exists()
    return path.resolve().parent.name if of_run else path.stem


def as_word(path: str | Path) -> str:
    """A path that no command takes for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def own_run(
    name: str, run: str | None, resume: str | None, on_lost: Callable[[str], None] | None = None
) -> tuple[RunFolder, owner.Held]:
    """(the run folder, its lease): chosen, taken, and what was chosen by looked at again, now that it stands still.

    Raises RequestError as `choose_run` and `owner.take` do.
    """
    folder = choose_run(name, run, resume)
    held = owner.take(folder.path, on_lost=on_lost)
    try:
        return choose_run(name, str(folder.path), resume), held
    except RequestError:
        held.release()
        raise


def choose_run(name: str, run: str | None, resume: str | None, runs: Path = RUNS) -> RunFolder:
    """The run folder: as asked for, the newest of this recipe (to resume), or a new one.

    resume: RESUME, RESUME_IF_EXISTS or None. Refuses to resume what is not there, and to start what is.
    """
    if run:
        folder = RunFolder(run)
        if resume == RESUME and not folder.exists():
            raise RequestError(
                f"--resume: no run in {run} (no recipe.yaml); name one that is there, or start it without --resume "
                f"(a batch script: with {RESUME_IF_EXISTS})"
            )
        if not resume and folder.exists():
            raise RequestError(f"--run {run}: a run is there already; continue it with --resume, or name another")
        return folder
    if resume == RESUME_IF_EXISTS:  # the newest may be another job's
        raise RequestError(f"{RESUME_IF_EXISTS}: say which run with --run")
    if resume:
        found = (p for p in runs.glob(f"{escape(name)}-{LIKE_TIME}") if RunFolder(p).exists())
        newest = max(found, key=lambda p: p.stat().st_mtime, default=None)
        if newest is None:
            raise RequestError(f"--resume: no run of {name} in {runs}/; name it with --run")
        return RunFolder(newest)
    return RunFolder(runs / f"{name}-{datetime.now():{TIME}}")
