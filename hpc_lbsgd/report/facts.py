"""What a run folder says about its run, in the shape that pages, plots and `watch` want. Pure reading."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hpc_lbsgd import yaml12
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import flatten
from hpc_lbsgd.records import RunFolder, read_metrics, seconds_of, whole

SECONDS = ("start-up", "data", "compute", "sums", "evaluation", "checkpoint", "other")  # where a run's time goes
NO_END = "no end on record"


@dataclass
class Start:
    """One start of a run: from its first record to its last."""

    attempt: int
    time: float  # seconds since 1970
    first_step: int
    ranks: int
    nodes: int
    device: str
    engine: str
    end: float = 0.0

    @property
    def hours(self) -> float:
        return max(self.end - self.time, 0.0) / 3600


@dataclass
class Facts:
    """A run by its records. Lists of steps, evaluations and noise are in order of the step."""

    name: str
    folder: Path
    status: str  # done | stopped | failed | NO_END
    recipe: dict  # as the folder has it
    starts: list[Start] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS, 0.0))
    weights_sha256: str | None = None

    @property
    def samples(self) -> int:
        """N."""
        return int(self.recipe.get("data", {}).get("samples") or 1)

    @property
    def accuracy(self) -> float | None:
        """Of the last evaluation: of averaged weights where the run has them."""
        if not self.evaluations:
            return None
        last = self.evaluations[-1]
        return last.get("ema_accuracy", last.get("accuracy"))

    @property
    def images_per_s(self) -> float | None:
        """Median over the steps of the last start, its first ten left out where there are more."""
        first = self.starts[-1].first_step if self.starts else 0
        rates = [r["images_per_s"] for r in self.steps if r["step"] >= first and r.get("images_per_s")]
        return median(rates[10:] or rates) if rates else None

    @property
    def node_hours(self) -> float:
        return sum(s.hours * s.nodes for s in self.starts)

    @property
    def seams(self) -> list[int]:
        """Steps at which a start went on."""
        return sorted({s.first_step for s in self.starts if s.first_step > 0})

    def epochs(self, rows: Iterable[dict]) -> list[float]:
        """Epochs done at each of these records, as a fraction: batches may grow, epochs stay."""
        places = {r["step"]: p for r, p in zip(self.steps, self._places, strict=True)}
        return [places.get(r["step"] if r["kind"] == "step" else r["step"] - 1, r.get("epoch", 0)) for r in rows]

    @property
    def _places(self) -> list[float]:
        found, epoch, seen = [], -1, 0
        for r in self.steps:
            if r["epoch"] != epoch:
                epoch, seen = r["epoch"], 0
            seen += r["samples"]
            found.append(epoch + min(seen / self.samples, 1.0))
        return found

    def noise(self) -> list[dict]:
        """Step records that have a noise scale."""
        return [r for r in self.steps if r.get("noise_scale") is not None]


def facts(run: str) -> Facts:
    """Read a run. Raises RequestError for a folder that is none."""
    folder = RunFolder(run)
    if not folder.exists():
        raise RequestError(f"{run}: no run (no recipe.yaml in it)")
    status = (folder.status() or {}).get("status", NO_END)
    found = Facts(folder.path.resolve().name, folder.path, status, yaml12.mapping_of(folder.recipe, str(folder.recipe)))
    steps: dict[int, dict] = {}
    evaluations: dict[int, dict] = {}
    before = 0.0
    nodes = {s.get("attempt"): len({r["host"] for r in s.get("ranks", [])}) for s in folder.starts()}
    for r in filter(whole, read_metrics(folder.metrics)):
        now = seconds_of(r["time"])
        if r["kind"] == "start":
            device = str(r.get("device", "?"))
            attempt = r.get("attempt", 0)
            found.starts.append(
                Start(attempt, now, r["step"], r["ranks"], nodes.get(attempt, 1) or 1, device, r.get("engine", "?"))
            )
            found.seconds["start-up"] += sum((r.get("start_s") or {}).values())
        else:
            spend(found.seconds, r, max(now - before, 0.0))
        before = now
        if found.starts:
            found.starts[-1].end = now
        if r["kind"] == "step":
            steps[r["step"]] = r
        elif r["kind"] == "eval":
            evaluations[r["step"]] = r
        elif r["kind"] == "event":
            found.events.append(r)
        elif r["kind"] == "end":
            found.weights_sha256 = r.get("weights_sha256")
    found.steps = [steps[s] for s in sorted(steps)]
    found.evaluations = [evaluations[s] for s in sorted(evaluations)]
    return found


def spend(seconds: dict[str, float], r: dict, passed: float) -> None:
    """Book the time between two records on what the second reports."""
    if r["kind"] == "step":
        data, sums, step = (r.get(key) or 0.0 for key in ("data_wait_s", "exposed_comm_s", "step_s"))
        seconds["data"] += data
        seconds["sums"] += sums
        seconds["compute"] += max(step - data - sums, 0.0)
        seconds["other"] += max(passed - step, 0.0)
    elif r["kind"] == "eval":
        seconds["evaluation"] += passed
    elif r["kind"] == "checkpoint":
        stall = r.get("stall_s", passed)  # steps went on beside the rest; it was booked as time that nothing names
        seconds["checkpoint"] += stall
        seconds["other"] += passed - stall
    else:
        seconds["other"] += passed


def thin(xs: Sequence[float], ys: Sequence[float | None], most: int = 600) -> tuple[list[float], list[float]]:
    """At most `most` points: means of equal runs of neighbours. What is no number is left out."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]
    width = max(1, math.ceil(len(pairs) / most))
    runs = [pairs[i : i + width] for i in range(0, len(pairs), width)]
    return [sum(x for x, _ in run) / len(run) for run in runs], [sum(y for _, y in run) / len(run) for run in runs]


def but_for_the_seed(recipe: dict) -> str:
    """What runs of one point share: all that decides a result but its seed."""
    flat = flatten(recipe)
    kept = {k: v for k, v in flat.items() if k != "seed" and not k.startswith(("machine.", "checkpoint."))}
    return json.dumps(kept, sort_keys=True)


def by_batch(runs: Sequence[Facts]) -> list[tuple[int, float, float, int]]:
    """(kn at the start, mean final error, its standard deviation over runs, runs) of evaluated runs, by kn. Runs that
    differ in their seed alone are one row: another learning rate is no spread."""
    errors: dict[tuple[int, str], list[float]] = {}
    for run in runs:
        if run.accuracy is not None and run.steps:
            key = run.steps[0]["global_batch"], but_for_the_seed(run.recipe)
            errors.setdefault(key, []).append(1 - run.accuracy)
    rows = []
    for (kn, _), found in sorted(errors.items()):
        mean = sum(found) / len(found)
        spread = math.sqrt(sum((e - mean) ** 2 for e in found) / (len(found) - 1)) if len(found) > 1 else 0.0
        rows.append((kn, mean, spread, len(found)))
    return rows


def by_ranks(runs: Sequence[Facts]) -> list[tuple[int, float, float]]:
    """(ranks, images/s, efficiency against the fewest ranks, by rank) of runs, the best of each number of ranks."""
    rates: dict[int, float] = {}
    for run in runs:
        if run.starts and run.images_per_s:
            ranks = run.starts[-1].ranks
            rates[ranks] = max(rates.get(ranks, 0.0), run.images_per_s)
    if not rates:
        return []
    fewest = min(rates)
    return [(n, rate, rate / n / (rates[fewest] / fewest)) for n, rate in sorted(rates.items())]
