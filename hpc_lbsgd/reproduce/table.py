"""What the cells of an experiment measured, beside the paper's figures: rows of numbers, then Markdown and JSON."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpc_lbsgd.reproduce.cells import Cell, Result
from hpc_lbsgd.reproduce.experiments import Experiment, Scale
from hpc_lbsgd.theory import tradeoff

SMOOTHED_EXAMPLES = 2048  # training loss is averaged over at least so many before it is held against the target


@dataclass
class Line:
    """A row of the table. Errors in %, over the seeds that ran to their end; None where none did."""

    label: str
    batch: int  # kn at the start
    largest_batch: int
    lr: float  # peak
    momentum: float
    steps: int
    runs: int
    diverged: int
    error: float | None
    std: float | None
    paper: str
    errors: list[float]
    cells: list[str]
    curve: dict[str, list[float]] = field(default_factory=dict)  # epoch, step, mean and std of the error


@dataclass
class TradeoffLine:
    """The best learning rate at one batch. steps and examples: to the target loss, median over seeds."""

    batch: int
    lr: float
    steps: float
    examples: float
    reached: int
    runs: int
    all_steps: list[float]


def group(cells: list[Cell]) -> list[list[Cell]]:
    """Cells by row, rows in their order."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row.label, []).append(cell)
    return list(rows.values())


def mean_std(values: list[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def line_of(cells: list[Cell]) -> Line:
    """One row from the finished cells of its seeds."""
    recipe, results = cells[0].recipe, [c.result for c in cells]
    n = recipe.batch.samples_per_worker
    ended = [r for r in results if r.error is not None]
    errors = [r.error for r in ended]
    error, std = mean_std(errors)
    schedule = recipe.build_schedule(recipe.data.samples)
    curve = {}
    if ended:
        by_epoch = list(zip(*(r.errors for r in ended), strict=True))
        curve = {
            "epoch": ended[0].epochs,
            "step": ended[0].evaluated_at,
            "mean": [statistics.fmean(v) for v in by_epoch],
            "std": [mean_std(list(v))[1] or 0.0 for v in by_epoch],
        }
    return Line(
        label=cells[0].row.label,
        batch=recipe.batch.workers * n,
        largest_batch=max(s.workers for s in schedule.stages) * n,
        lr=schedule.stages[0].lr,
        momentum=recipe.optim.momentum,
        steps=schedule.full_steps,
        runs=len(results),
        diverged=len(results) - len(ended),
        error=error,
        std=std,
        paper=cells[0].row.paper,
        errors=errors,
        cells=[str(c.folder.path) for c in cells],
        curve=curve,
    )


def standard_error(line: Line) -> float:
    """Of the mean over seeds; 0 where there is one seed."""
    return (line.std or 0.0) / math.sqrt(max(1, line.runs - line.diverged))


def break_point(lines: list[Line], reference: int) -> Line | None:
    """The smallest batch from which on every mean error is above the reference's by more than twice the standard
    error of their difference, or runs stop being finite."""
    base = next(line for line in lines if line.batch == reference)
    found = None
    for line in sorted(lines, key=lambda x: x.batch):
        if line.batch <= reference:
            continue
        noise = math.hypot(standard_error(line), standard_error(base))
        broken = line.error is None or line.diverged or line.error - base.error > 2 * noise
        found = (found or line) if broken else None
    return found


# ---------------------------------------------------------------- steps against examples


def steps_to(result: Result, target: float) -> tuple[int, int] | None:
    """(steps, examples) until the training loss, averaged over the last 2,048 examples or more, is at the target."""
    examples = 0
    window: list[tuple[float, int]] = []
    for step, (loss, batch) in enumerate(zip(result.losses, result.batches, strict=True), start=1):
        examples += batch
        window.append((loss, batch))
        while sum(b for _, b in window[1:]) >= SMOOTHED_EXAMPLES:
            window.pop(0)
        total = sum(b for _, b in window)
        if total >= SMOOTHED_EXAMPLES and sum(x * b for x, b in window) / total <= target:
            return step, examples
    return None


def tradeoff_lines(cells: list[Cell], target: float) -> list[TradeoffLine]:
    """For each batch the learning rate that needs the fewest steps (median over seeds that all got there)."""
    by_batch: dict[int, list[TradeoffLine]] = {}
    for row in group(cells):
        recipe = row[0].recipe
        batch = recipe.batch.kn
        found = [f for f in (steps_to(c.result, target) for c in row) if f]
        steps = [float(s) for s, _ in found]
        line = TradeoffLine(
            batch=batch,
            lr=recipe.optim.base_lr,
            steps=statistics.median(steps) if steps else math.inf,
            examples=statistics.median([float(e) for _, e in found]) if found else math.inf,
            reached=len(found),
            runs=len(row),
            all_steps=steps,
        )
        by_batch.setdefault(batch, []).append(line)
    best = [min(lines, key=lambda x: (-x.reached, x.steps)) for lines in by_batch.values()]
    return sorted(best, key=lambda x: x.batch)


def mean_noise_scale(cells: list[Cell], target: float) -> tuple[float, float, float] | None:
    """B_simple averaged over the way to the target: (mean, smallest batch's view, largest's), trace and square
    averaged apart over all measurements of all runs."""
    by_batch: dict[int, list[tuple[float, float]]] = {}
    for cell in cells:
        recipe, reached = cell.recipe, steps_to(cell.result, target)
        batch = recipe.batch.kn
        if reached:
            by_batch.setdefault(batch, []).extend((t, s) for step, t, s in cell.result.noise if step < reached[0])
    views = []
    for _, measured in sorted(by_batch.items()):
        square = statistics.fmean(s for _, s in measured) if measured else 0.0
        if square > 0:
            views.append(statistics.fmean(t for t, _ in measured) / square)
    everything = [m for measured in by_batch.values() for m in measured]
    square = statistics.fmean(s for _, s in everything) if everything else 0.0
    if square <= 0:
        return None
    return statistics.fmean(t for t, _ in everything) / square, min(views), max(views)


# ---------------------------------------------------------------- the whole experiment


@dataclass
class Report:
    """All that an experiment measured, and what it says of the paper's claim."""

    name: str
    scale: str
    seeds: int
    lines: list
    findings: list[str]
    facts: dict


def summarise(experiment: Experiment, scale: Scale, cells: list[Cell], seeds: int) -> Report:
    if experiment.kind == "tradeoff":
        return _summarise_tradeoff(experiment, scale, cells, seeds)
    lines = [line_of(row) for row in group(cells)]
    findings, facts = [], {}
    if experiment.kind == "batches":
        n = cells[0].recipe.batch.samples_per_worker
        broken = break_point(lines, scale.reference * n)
        facts["break_point"] = broken.batch if broken else None
        facts["reference_batch"] = scale.reference * n
        findings.append(
            f"The error leaves that of kn = {scale.reference * n} at kn = {broken.batch}: there, and at every larger "
            "batch, it is higher by more than twice the standard error of the difference."
            if broken
            else f"No batch up to kn = {lines[-1].batch} leaves the error of kn = {scale.reference * n}."
        )
    for line in lines:
        if line.diverged:
            findings.append(f"{line.label}: {line.diverged} of {line.runs} runs stopped being finite.")
    return Report(experiment.name, scale.name, seeds, lines, findings, facts)


def _summarise_tradeoff(experiment: Experiment, scale: Scale, cells: list[Cell], seeds: int) -> Report:
    lines = tradeoff_lines(cells, scale.target_loss)
    got = [x for x in lines if x.reached == x.runs]
    findings, facts = [], {"target_loss": scale.target_loss}
    for line in lines:
        if line not in got:
            findings.append(f"kn = {line.batch}: {line.reached} of {line.runs} runs reached the target; left out.")
    pairs = [(x.batch, s) for x in got for s in x.all_steps]
    try:
        batches, steps = zip(*pairs, strict=True)
        frontier = tradeoff.fit(batches, steps)
        low, high = tradeoff.fit_interval(batches, steps)
        facts |= {"min_steps": frontier.min_steps, "min_examples": frontier.min_examples}
        facts |= {"critical_batch": frontier.critical_batch, "critical_batch_interval": [low, high]}
        findings.append(
            f"B_crit = {frontier.critical_batch:.0f} (90 % interval {low:.0f} to {high:.0f}), from "
            f"S_min = {frontier.min_steps:.0f} steps and E_min = {frontier.min_examples:.0f} examples to a training "
            f"loss of {scale.target_loss:g}."
        )
    except ValueError as problem:
        findings.append(f"No frontier: {problem}.")
    noise = mean_noise_scale(cells, scale.target_loss)
    if noise:
        facts |= {"noise_scale": noise[0], "noise_scale_by_batch": list(noise[1:])}
        findings.append(
            f"B_simple = {noise[0]:.0f}, averaged over the way there ({noise[1]:.0f} to {noise[2]:.0f} by batch)."
        )
        if "critical_batch" in facts:
            ratio = noise[0] / facts["critical_batch"]
            word = "within" if 0.1 <= ratio <= 10 else "outside"
            facts["ratio"] = ratio
            findings.append(f"B_simple / B_crit = {ratio:.2g}: {word} the factor of ten that the paper allows.")
    return Report(experiment.name, scale.name, seeds, lines, findings, facts)


def with_spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f} ± {std:.2f}" if std is not None else f"{mean:.2f}"


def markdown(experiment: Experiment, report: Report, command: str, conditions: list[str]) -> str:
    out = [f"# {experiment.title}", "", f"{experiment.source}. {experiment.claim}", ""]
    if report.facts.get("cut_short"):
        out += [f"**Not the whole experiment**: {report.facts['cut_short']}. Conclude nothing from it.", ""]
    if experiment.kind == "tradeoff":
        out += ["| kn | best learning rate | steps | examples | runs that got there |", "|---:|---:|---:|---:|---:|"]
        for x in report.lines:
            steps = (f"{x.steps:.0f}", f"{x.examples:.0f}") if math.isfinite(x.steps) else ("–", "–")
            out.append(f"| {x.batch} | {x.lr:g} | {steps[0]} | {steps[1]} | {x.reached} of {x.runs} |")
    else:
        out += [
            "| | kn | learning rate | momentum | updates | error, % | the paper |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for x in report.lines:
            batch = f"{x.batch}" + (f" → {x.largest_batch}" if x.largest_batch > x.batch else "")
            lost = f"{x.diverged} of {x.runs} diverged" if x.diverged else ""
            error = lost if x.error is None else with_spread(x.error, x.std) + (f" ({lost})" if lost else "")
            out.append(f"| {x.label} | {batch} | {x.lr:g} | {x.momentum:g} | {x.steps} | {error} | {x.paper} |")
        spread = f"; mean ± standard deviation over {report.seeds} seeds" if report.seeds > 1 else ", one seed"
        out += ["", f"Error: median of the last 5 epochs{spread}."]
    out += ["", *(f"- {f}" for f in report.findings)] if report.findings else []
    out += ["", f"![{experiment.title}]({experiment.name}.png)", "", f"    {command}", ""]
    out += [f"- {c}" for c in conditions]
    return "\n".join(out) + "\n"


def as_json(report: Report) -> dict:
    found = asdict(report)
    for line in found["lines"]:
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = None
    return found


def from_json(content: dict) -> Report:
    """What `as_json` made JSON of."""
    kind = TradeoffLine if "reached" in content["lines"][0] else Line
    unbounded = ("steps", "examples") if kind is TradeoffLine else ()
    lines = [kind(**x | {key: math.inf for key in unbounded if x[key] is None}) for x in content["lines"]]
    return Report(lines=lines, **{key: content[key] for key in ("name", "scale", "seeds", "findings", "facts")})


def write(folder: Path, experiment: Experiment, text: str, content: str) -> list[Path]:
    from hpc_lbsgd.records import write_atomically

    paths = [folder / f"{experiment.name}.md", folder / f"{experiment.name}.json"]
    for path, data in zip(paths, (text, content), strict=True):
        write_atomically(path, data)
    return paths
