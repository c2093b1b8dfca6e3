"""The figures of a report: matplotlib's, as SVG that takes its ink from the page, or as files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc_lbsgd.records import metrics_of
from hpc_lbsgd.report.facts import SECONDS, Facts, by_batch, by_ranks, thin
from hpc_lbsgd.report.figures import DPI

# Okabe and Ito's palette, that people who see fewer colours tell apart, as light as dark paper bears
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
# for further runs, told apart by their dashes too
MORE = ("#9467BD", "#E41A1C", "#4DAF4A", "#8C564B", "#BCBD22", "#17BECF", "#F781BF")
INK = "#010203"  # stands for the page's own ink: light paper has it dark, and dark paper light
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))
LONGEST = 28  # letters of a run's name in a figure
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def colour(i: int) -> str:
    every = COLOURS + MORE
    return every[i % len(every)]


def line(i: int):
    """The dashes of run i: with its colour they are its own, up to 28 runs."""
    return DASHES[i // len(COLOURS) % len(DASHES)]


def short(name: str) -> str:
    """What of a name fits beside a curve. matplotlib hides names that begin with _, and takes $ for mathematics."""
    fits = name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
    return (" " if fits.startswith("_") else "") + fits.replace("$", r"\$")


def mark(i: int) -> str:
    return MARKS[i % len(MARKS)]


class Canvas:
    """One figure of one axis, `draw`n on."""

    def __init__(self, xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 3.4), ink: str = INK):
        from matplotlib.figure import Figure

        self.ink = ink
        self.figure = Figure(figsize=size, layout="constrained")
        self.axis = axis = self.figure.subplots()
        self.figure.patch.set_alpha(0)
        axis.patch.set_alpha(0)
        axis.set_xlabel(xlabel, color=ink)
        axis.set_ylabel(ylabel, color=ink)
        axis.tick_params(colors=ink, which="both")
        for side, spine in axis.spines.items():
            spine.set_color(ink)
            spine.set_visible(side in ("left", "bottom"))
        axis.set_axisbelow(True)
        axis.grid(alpha=0.2, color=ink, linewidth=0.6)

    def legend(self) -> None:
        handles, labels = self.axis.get_legend_handles_labels()
        if len(labels) > 1:
            self.figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False,
                               labelcolor=self.ink, fontsize=8)  # fmt: skip

    def svg(self, name: str) -> str:
        """For a page: text stays text, ids are this figure's own."""
        import matplotlib

        out = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()[out.getvalue().index("<svg") :]
        text = re.sub(r'(id="|url\(#|href="#)', lambda m: f"{m[1]}{name}-", text)
        return text.replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" ', 1)

    def save(self, path: Path) -> None:
        self.figure.savefig(path, dpi=DPI, facecolor="white")


Figure = Callable[[Sequence[Facts], str], "Canvas | None"]


# ---------------------------------------------------------------- what is drawn


def curve(
    runs: Sequence[Facts], ink: str, key: str, ylabel: str, scale: float = 1.0, log: bool = False
) -> Canvas | None:
    """A value of step records over epochs, a line a run; dotted lines where a run went on after a stop."""
    if not any(r.get(key) is not None for run in runs for r in run.steps):
        return None
    canvas = Canvas("epochs", ylabel, ink=ink)
    for i, run in enumerate(runs):
        at = run.epochs(run.steps)
        xs, ys = thin(at, [None if r.get(key) is None else scale * r[key] for r in run.steps])
        canvas.axis.plot(xs, ys, color=colour(i), linestyle=line(i), label=short(run.name), linewidth=1.2)
        seams = set(run.seams)
        for r, x in zip(run.steps, at, strict=True):
            if r["step"] in seams:
                canvas.axis.axvline(x, color=colour(i), linestyle=":", linewidth=1)
    if log:
        canvas.axis.set_yscale("log")
    elif key != "loss":
        canvas.axis.set_ylim(bottom=0)
    canvas.legend()
    return canvas


def loss(runs: Sequence[Facts], ink: str) -> Canvas | None:
    canvas = curve(runs, ink, "loss", "loss")
    for i, run in enumerate(runs if canvas else ()):
        evals = [r for r in run.evaluations if r.get("loss") is not None]
        at = run.epochs(evals)
        look = {"color": colour(i), "linestyle": "none", "marker": mark(i), "markersize": 4}
        canvas.axis.plot(at, [r["loss"] for r in evals], label=None if i else "evaluation", **look)
    if canvas:
        for old in canvas.figure.legends:
            old.remove()
        canvas.legend()
    return canvas


def accuracy(runs: Sequence[Facts], ink: str) -> Canvas | None:
    if not any(r.get("accuracy") is not None for run in runs for r in run.evaluations):
        return None
    canvas = Canvas("epochs", "test accuracy, %", ink=ink)
    for i, run in enumerate(runs):
        for key, width in (("accuracy", 1.5), ("ema_accuracy", 0.7)):
            rows = [r for r in run.evaluations if r.get(key) is not None]
            if rows:
                label = short(run.name) if key == "accuracy" else f"{short(run.name)}, averaged weights"
                look = {"color": colour(i), "marker": mark(i), "markersize": 4, "label": label}
                look |= {"linestyle": line(i), "linewidth": width}
                canvas.axis.plot(run.epochs(rows), [100 * r[key] for r in rows], **look)
    canvas.legend()
    return canvas


def own(runs: Sequence[Facts], ink: str) -> Canvas | None:
    """The users' metrics after each evaluation, a line each; all on one axis."""
    canvas = None
    for i, run in enumerate(runs):
        for j, name in enumerate(dict.fromkeys(k for r in run.evaluations for k in metrics_of(r))):
            canvas = canvas or Canvas("epochs", "", ink=ink)
            rows = [r for r in run.evaluations if r.get(name) is not None]
            label = name if len(runs) == 1 else f"{short(run.name)}: {name}"
            look = {"color": colour(j if len(runs) == 1 else i), "marker": mark(j), "markersize": 4, "label": label}
            canvas.axis.plot(run.epochs(rows), [r[name] for r in rows], "-", **look)
    if canvas:
        canvas.legend()
    return canvas


def noise(runs: Sequence[Facts], ink: str) -> Canvas | None:
    """The noise scale with its interval, and the batch that was used (McCandlish et al. 2018)."""
    if not any(run.noise() for run in runs):
        return None
    canvas = Canvas("epochs", "images", ink=ink)
    for i, run in enumerate(runs):
        rows = run.noise()
        if not rows:
            continue
        at = run.epochs(rows)
        low, high = ([r.get(f"noise_scale_{end}") or r["noise_scale"] for r in rows] for end in ("low", "high"))
        scale = thin(at, [r["noise_scale"] for r in rows])
        canvas.axis.plot(*scale, color=colour(i), linestyle=line(i), label=f"{short(run.name)}: noise scale")
        canvas.axis.fill_between(*thin(at, low), thin(at, high)[1], color=colour(i), alpha=0.2, linewidth=0)
        batches = thin(run.epochs(run.steps), [r["global_batch"] for r in run.steps])
        canvas.axis.plot(*batches, "--", color=colour(i), linewidth=1, label=f"{short(run.name)}: kn")
    canvas.axis.set_yscale("log")
    canvas.legend()
    return canvas


def time(runs: Sequence[Facts], ink: str) -> Canvas | None:
    """Shares of each run's time by what it was spent on."""
    runs = [run for run in runs if sum(run.seconds.values())]
    if not runs:
        return None
    canvas = Canvas("share of the time on record, %", "", (6.4, 0.9 + 0.45 * len(runs)), ink)
    left = [0.0] * len(runs)
    for i, part in enumerate(SECONDS):
        shares = [100 * run.seconds[part] / sum(run.seconds.values()) for run in runs]
        if any(shares):
            canvas.axis.barh(range(len(runs)), shares, left=left, color=colour(i), label=part, height=0.6)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    canvas.axis.set_yticks(range(len(runs)), [short(run.name) for run in runs])
    canvas.axis.set_xlim(0, 100)
    canvas.axis.invert_yaxis()
    canvas.legend()
    return canvas


def scaling(runs: Sequence[Facts], ink: str) -> Canvas | None:
    """Images a second by ranks, beside the ideal line through the fewest."""
    rows = by_ranks(runs)
    if len(rows) < 2:
        return None
    canvas = Canvas("ranks", "images/s", ink=ink)
    n, rate = [r[0] for r in rows], [r[1] for r in rows]
    canvas.axis.plot(n, [rate[0] / n[0] * x for x in n], "--", color=ink, linewidth=1, label="ideal")
    canvas.axis.plot(n, rate, color=colour(0), marker="o", label="measured")
    canvas.legend()
    return canvas


def error(runs: Sequence[Facts], ink: str) -> Canvas | None:
    """Final error by the batch that a run started with; bars: standard deviation (Goyal et al. 2017, fig. 1)."""
    rows = by_batch(runs)
    if len(rows) < 2:
        return None
    canvas = Canvas("kn, images", "test error, %", ink=ink)
    batches = sorted({r[0] for r in rows})
    one_each = len(batches) == len(rows)  # else recipes differ in more than batch and seed, and no line joins them
    canvas.axis.errorbar([r[0] for r in rows], [100 * r[1] for r in rows], [100 * r[2] for r in rows], color=colour(0),
                         marker="o", linestyle="-" if one_each else "none", capsize=3)  # fmt: skip
    canvas.axis.set_xscale("log", base=2)
    canvas.axis.set_xticks(batches, [f"{kn:,}" for kn in batches], color=ink)
    canvas.axis.minorticks_off()
    return canvas


# name: (title, what it says, how it is drawn)
FIGURES: dict[str, tuple[str, str, Figure]] = {
    "loss": ("Loss", "Training loss a step, averaged where steps are many; marks: evaluations.", loss),
    "accuracy": ("Test accuracy", "After each evaluation.", accuracy),
    "metrics": ("Own metrics", "After each evaluation (train.metrics).", own),
    "lr": ("Learning rate", "As the schedule had it, decisions and amendments included.",
           lambda runs, ink: curve(runs, ink, "lr", "learning rate", log=True)),
    "batch": ("Global batch kn", "Images a step.", lambda runs, ink: curve(runs, ink, "global_batch", "images")),
    "rate": ("Speed", "Images a second over all ranks; dotted lines: a start that went on.",
             lambda runs, ink: curve(runs, ink, "images_per_s", "images/s")),
    "time": ("Why is it slow", "Where the time on record went.", time),
    "scaling": ("Scaling", "The last start of each run, its median rate.", scaling),
    "noise": ("Noise scale against batch", "Below its noise scale a batch is used well; far above it is wasted "
              "(McCandlish et al. 2018).", noise),
    "error": ("Error by batch", "Runs that differ in their seed alone share a point.", error),
}  # fmt: skip
