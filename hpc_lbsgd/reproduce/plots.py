"""An experiment as a picture. Files only: no window is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from hpc_lbsgd.report import figures
from hpc_lbsgd.reproduce.experiments import Experiment, Scale
from hpc_lbsgd.reproduce.table import Line, Report
from hpc_lbsgd.theory.tradeoff import Tradeoff

SIZE = (7.0, 4.2)  # inches


def draw(path: Path, experiment: Experiment, scale: Scale, report: Report, made: Mapping) -> None:
    """made: the command and the commit that measured it."""
    columns = 2 if experiment.kind in ("curves", "tradeoff") else 1
    figure, axes = figures.panels(columns, (SIZE[0] * (1 + 0.5 * (columns - 1)), SIZE[1]))
    {"error": _errors, "batches": _batches, "curves": _curves, "tradeoff": _tradeoff}[experiment.kind](
        axes, report, scale
    )
    title = (
        f"{experiment.title} ({experiment.source}; scale {scale.name}, {report.seeds} seed{'s' * (report.seeds > 1)})"
    )
    figure.suptitle(f"{title}\n{report.facts.get('cut_short') or ''}".strip(), fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.3)
    figures.save(figure, path, made)


def _curve(axis, line: Line, along: str) -> None:
    c = line.curve
    if not c:
        return
    mean, std = np.array(c["mean"]), np.array(c["std"])
    (drawn,) = axis.plot(c[along], mean, marker="o", markersize=3, label=line.label)
    axis.fill_between(c[along], mean - std, mean + std, alpha=0.2, color=drawn.get_color(), linewidth=0)


def _limit(axis, lines: list[Line]) -> None:
    """Room for the end of the curves: the first epochs would flatten them."""
    ends = [e for x in lines if x.curve for e in x.curve["mean"]]
    if ends:
        axis.set_ylim(min(ends) - 1, np.quantile(ends, 0.9) + 5)


def _errors(axes, report: Report, scale: Scale) -> None:
    for line in report.lines:
        _curve(axes[0], line, "epoch")
    _limit(axes[0], report.lines)
    axes[0].set(xlabel="epoch", ylabel="error, %")
    axes[0].legend(fontsize=8)


def _plain(*scales) -> None:
    """Log scales with a few plain numbers: the more decades, the fewer of each."""
    for scale in scales:
        low, high = scale.get_view_interval()
        decades = np.log10(high / low) if low > 0 else 1.0
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1.2 else (1.0, 2.0, 5.0) if decades < 2.2 else (1.0, 3.0)
        scale.set_major_locator(LogLocator(subs=subs))
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))
        scale.set_minor_locator(NullLocator())


def _batches(axes, report: Report, scale: Scale) -> None:
    axis, shown = axes[0], [x for x in report.lines if x.error is not None]
    bars = [2 * (x.std or 0.0) for x in shown]
    axis.errorbar([x.batch for x in shown], [x.error for x in shown], yerr=bars, marker="o", capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="global batch kn", ylabel="error, % (± 2 standard deviations)")
    _plain(axis.yaxis)
    lost = [x.batch for x in report.lines if x.error is None]
    for batch in lost:
        axis.axvline(batch, linestyle=":", color="tab:red", label="diverged" if batch == lost[0] else None)
    if report.facts["break_point"]:
        axis.axvline(report.facts["break_point"], linestyle="--", color="grey", label="break point")
    axis.axvline(report.facts["reference_batch"], linestyle="-.", color="tab:green", label="reference batch")
    axis.legend(fontsize=8)


def _curves(axes, report: Report, scale: Scale) -> None:
    for axis, along, label in ((axes[0], "epoch", "epoch"), (axes[1], "step", "updates")):
        for line in report.lines:
            _curve(axis, line, along)
        _limit(axis, report.lines)
        axis.set(xlabel=label, ylabel="error, %")
    axes[1].set_xscale("log")
    _plain(axes[1].xaxis)
    axes[0].legend(fontsize=8)


def _tradeoff(axes, report: Report, scale: Scale) -> None:
    shown = [x for x in report.lines if x.reached == x.runs]
    frontier, facts = axes[0], report.facts
    frontier.plot([x.steps for x in shown], [x.examples for x in shown], "o", label="measured")
    for x in shown:
        frontier.annotate(f"{x.batch}", (x.steps, x.examples), textcoords="offset points", xytext=(5, 4), fontsize=8)
    if "critical_batch" in facts:
        fit = Tradeoff(facts["min_steps"], facts["min_examples"])
        batches = np.geomspace(min(x.batch for x in shown) / 2, max(x.batch for x in shown) * 2, 100)
        frontier.plot([fit.steps(b) for b in batches], [fit.examples(b) for b in batches], label="fit (eq. 2.11)")
        axes[1].axvline(fit.critical_batch, color="tab:orange", label="B_crit")
    frontier.set(xlabel="steps", ylabel="examples", xscale="log", yscale="log")
    _plain(frontier.xaxis, frontier.yaxis)
    frontier.legend(fontsize=8)
    axes[1].plot([x.batch for x in shown], [x.lr for x in shown], "o-", label="best learning rate")
    if "noise_scale" in facts:
        axes[1].axvline(facts["noise_scale"], color="tab:green", linestyle="--", label="B_simple")
    axes[1].set(xlabel="global batch kn", ylabel="learning rate", xscale="log", yscale="log")
    axes[1].set_xscale("log", base=2)
    _plain(axes[1].yaxis)
    axes[1].legend(fontsize=8)
