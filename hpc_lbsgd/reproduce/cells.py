"""One run of a table: where it lies, whether it is finished, and what came out of it."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.reproduce.experiments import Row

LAST = 5  # epochs whose median is the error (Goyal et al. 2017, section 5.1)
TAIL_BYTES = 4096  # of metrics.jsonl, enough for its last record


@dataclass(frozen=True)
class Cell:
    """A row of a table with one seed."""

    row: Row
    seed: int
    recipe: Recipe
    root: Path  # folder of all cells

    @cached_property
    def folder(self) -> RunFolder:
        """Named by what decides the result, so that tables share the runs they have in common."""
        data = (self.recipe.data.train, self.recipe.data.eval, self.recipe.train.max_steps)
        key = hashlib.sha256(json.dumps([self.recipe.fingerprint(), data]).encode()).hexdigest()[:16]
        return RunFolder(self.root / key)

    @property
    def name(self) -> str:
        return f"{self.row.label}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """It ran to its end, or to the step where it stopped being finite; both are results."""
        status = self.folder.status()
        return bool(status) and (status["status"] == "done" or self.diverged_at is not None)

    @property
    def diverged_at(self) -> int | None:
        status = self.folder.status()
        if not status or status["status"] != "failed":
            return None
        return next((r["step"] for r in read_metrics(self.folder.metrics) if r.get("event") == "non-finite"), None)

    def progress(self, steps: int) -> float:
        """How much of the run is done, 0 to 1, from the newest record on disk."""
        try:
            with open(self.folder.metrics, "rb") as f:
                f.seek(max(0, f.seek(0, 2) - TAIL_BYTES))
                lines = f.read().decode(errors="replace").splitlines()[1:-1]
            return min(1.0, json.loads(lines[-1])["step"] / steps)
        except (OSError, ValueError, IndexError, KeyError):
            return 0.0

    @cached_property
    def result(self) -> Result:
        return read_result(self)


@dataclass(frozen=True)
class Result:
    """What a finished cell measured. Errors in %, one an evaluated epoch."""

    steps: int
    diverged_at: int | None
    epochs: list[int]
    errors: list[float]
    evaluated_at: list[int]  # steps done
    losses: list[float]  # training loss, one a step
    batches: list[int]  # global batch, one a step
    noise: list[tuple[int, float, float]]  # (step, trace, square)
    seconds: float

    @property
    def error(self) -> float | None:
        """Median over the last five epochs, in %; None for a run that did not reach its end."""
        return statistics.median(self.errors[-LAST:]) if self.errors and self.diverged_at is None else None


def read_result(cell: Cell) -> Result:
    records = list(read_metrics(cell.folder.metrics))
    evals = [r for r in records if r["kind"] == "eval" and r.get("accuracy") is not None]
    steps = [r for r in records if r["kind"] == "step"]
    return Result(
        steps=len(steps),
        diverged_at=cell.diverged_at,
        epochs=[r["epoch"] for r in evals],
        errors=[100 * (1 - r["accuracy"]) for r in evals],
        evaluated_at=[r["step"] for r in evals],
        losses=[r["loss"] for r in steps],
        batches=[r["global_batch"] for r in steps],
        noise=[(r["step"], r["noise_trace"], r["noise_square"]) for r in steps if "noise_trace" in r],
        seconds=sum(r["step_s"] for r in steps),
    )


QUICK = 5  # a quick look takes this part of the epochs


def quicker(recipe: Recipe) -> list[str]:
    """Settings for a quick look: fewer epochs, the schedule's shape kept as far as whole epochs can."""
    full = recipe.train.epochs
    epochs = min(full, max(2, round(full / QUICK)))
    milestones = sorted({max(1, round(m * epochs / full)) for m in recipe.schedule.milestones})
    found = {
        "train.epochs": epochs,
        "train.eval_epochs": min(recipe.train.eval_epochs, epochs),
        "schedule.milestones": [m for m in milestones if m < epochs],
        "schedule.warmup_epochs": recipe.schedule.warmup_epochs * epochs / full,
    }
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


def cut_short(cells: list[Cell], quick: bool) -> str | None:
    """Why these are not the runs that the experiment is made of; None where they are."""
    if quick:
        epochs = sorted({c.recipe.train.epochs for c in cells})
        return f"a quick look, with about 1/{QUICK} of the epochs ({', '.join(map(str, epochs))})"
    capped = [c.recipe for c in cells if c.recipe.train.max_steps]
    steps = {r.build_schedule(r.data.samples).steps for r in capped}
    full = {r.build_schedule(r.data.samples).full_steps for r in capped}
    if capped and min(steps) < max(full):
        return f"cut short by train.max_steps, at {min(steps)} of up to {max(full)} steps"
    return None


def cells_of(rows: list[Row], seeds: int, settings: list[str], root: Path, quick: bool = False) -> list[Cell]:
    """All cells of a table, a row after the other; settings: `--set` of the user, for every row."""
    found = []
    for seed in range(seeds):  # one seed of every row first: a first picture comes early
        for row in rows:
            keys = [f"{key}={json.dumps(value)}" for key, value in row.settings.items()]
            keys += [f"seed={seed}", *settings]
            recipe = recipes.read(row.recipe, keys)
            if quick:
                recipe = recipes.read(row.recipe, keys + quicker(recipe))
            found.append(Cell(row, seed, recipe, root))
    return found
