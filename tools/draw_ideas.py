"""The pictures of docs/how-it-works.md, drawn from the functions that they are about:

python tools/draw_ideas.py [FOLDER]      (default: docs/pictures; `make figures`)
"""

from __future__ import annotations

import ast
import random
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data.order import Permutation, worker_samples, workers_of_rank
from hpc_lbsgd.report.curves import COLOURS
from hpc_lbsgd.report.figures import DPI, panels
from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
HOUSE = Path(__file__).parents[1] / "hpc_lbsgd"
LIBRARIES = [("numpy", "numpy"), ("torch", "torch"), ("horovod", "Horovod"), ("mpi4py", "mpi4py"), ("nvidia", "DALI")]
N, WORKERS, EACH = 22, 4, 3  # samples, k, n: the second step of the epoch is a tail of 10


def small_schedule() -> Schedule:
    return Schedule(N, EACH, [Stage(0, WORKERS, 0.1, 0.9)], 1, "partial", Warmup(0, 0.1))


def box(axis, x: float, y: float, width: float, text: str, colour: str) -> None:
    axis.barh(y, width, left=x, height=0.8, color=colour, alpha=0.85, edgecolor="white", linewidth=2)
    axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=9, color="black")


def bare(axis, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.invert_yaxis()


def clock() -> Figure:
    """Learning rate and batch by step, as `at` says them."""
    schedule = recipes.read("smith-resnet50").build_schedule(1_281_167)
    steps = np.linspace(0, schedule.steps - 1, 1500).astype(int)
    points = [schedule.at(int(s)) for s in steps]
    figure, axes = panels(2, (9.5, 2.6))
    for axis, values, label in (
        (axes[0], [p.lr for p in points], "learning rate"),
        (axes[1], [p.global_batch for p in points], "kn, images"),
    ):
        axis.plot(steps, values, color=COLOURS[0])
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].yaxis.set_major_formatter("{x:,.0f}")
    return figure


def order() -> Figure:
    """One epoch's permutation, cut into steps and workers."""
    schedule, permutation = small_schedule(), Permutation(N, 0, 0)
    figure, (axis,) = panels(1, (9.5, 1.7))
    for row in range(2):
        point = schedule.at(row)
        for worker in range(WORKERS):
            for i, sample in enumerate(worker_samples(permutation, point, worker)):
                box(axis, worker * EACH + i, row, 1, str(sample), COLOURS[worker])
    axis.set_yticks([0, 1], ["step 0", "step 1, a tail"])
    bare(axis, f"{N} samples in the epoch's order; a colour a worker, {EACH} samples each")
    return figure


def workers() -> Figure:
    """Whose work is done where, on 1, 2 and 3 ranks."""
    figure, axes = panels(3, (9.5, 1.9))
    for axis, ranks in zip(axes, (1, 2, 3), strict=True):
        for rank in range(ranks):
            for place, worker in enumerate(workers_of_rank(WORKERS, rank, ranks)):
                box(axis, place, rank, 1, f"worker {worker}", COLOURS[worker])
        axis.set_yticks(range(ranks), [f"rank {r}" for r in range(ranks)])
        axis.set_xlim(0, WORKERS)
        axis.set_ylim(-0.6, 2.6)
        bare(axis, f"{ranks} rank{'s' if ranks > 1 else ''}: one pass after another →")
    return figure


def sums() -> Figure:
    """The sum of the same numbers in many orders: how many different results."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=64) * 10.0 ** rng.uniform(-4, 0, 64)).astype(np.float32)
    whole = np.rint(values.astype(np.float64) * 2.0**40).astype(np.int64)
    draw, floats, integers = random.Random(0), [], []
    for _ in range(2000):
        way = draw.sample(range(64), 64)
        total, exact = np.float32(0), 0
        for i in way:
            total, exact = total + values[i], exact + int(whole[i])
        floats.append(float(total))
        integers.append(exact / 2.0**40)
    figure, axes = panels(2, (9.5, 2.4))
    middle = integers[0]
    widest = 1.1e7 * max(abs(f - middle) for f in floats)
    for axis, found, title, colour in (
        (axes[0], floats, "float32", COLOURS[1]),
        (axes[1], integers, "int64 units of 2^-40", COLOURS[2]),
    ):
        apart = sorted({(f - middle) * 1e7 for f in found})
        counts = [sum(abs((f - middle) * 1e7 - a) < 1e-9 for f in found) for a in apart]
        axis.vlines(apart, 0, counts, color=colour, linewidth=3)
        axis.set_title(f"{title}: {len(apart)} result{'s' if len(apart) > 1 else ''}", fontsize=10, loc="left")
        axis.set_xlabel("difference, 10⁻⁷")
        axis.set_ylabel("orders, of 2,000")
        axis.set_xlim(-widest, widest)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def edge() -> Figure:
    """Which packages import which library, anywhere in them: read from their sources."""
    met = {name: set() for name in ("theory", "data", "parallel", "train", "cluster")}
    for package, libraries in met.items():
        for file in (HOUSE / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                libraries.update((name.partition(".")[0], file) for name in names)
    figure, (axis,) = panels(1, (9.5, 2.6))
    for row, libraries in enumerate(met.values()):
        for column, (module, _) in enumerate(LIBRARIES):
            files = sorted(file.stem for name, file in libraries if name == module)
            if files:
                text = f"{len(files)} files" if len(files) > 2 else ", ".join(files)
                box(axis, column, row, 1, text, COLOURS[2 if len(files) <= 2 else 0])
    axis.set_yticks(range(len(met)), [f"{name}/" for name in met])
    axis.set_xlim(0, len(LIBRARIES))
    bare(axis, "")
    axis.set_xticks([i + 0.5 for i in range(len(LIBRARIES))], [label for _, label in LIBRARIES])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    return figure


def proof() -> Figure:
    """When a run's promise is looked at: before, during and after its steps."""
    every, steps = 100, 400
    figure, (axis,) = panels(1, (9.5, 1.9))
    box(axis, -95, 0, 90, "preflight", COLOURS[1])
    box(axis, 0, 0, steps, "", COLOURS[0])
    axis.text(every / 2, 0, "steps", ha="center", va="center", fontsize=9)
    for step in range(every, steps, every):
        axis.plot(step, 0, "v", color=COLOURS[3], markersize=12, markeredgecolor="white")
    box(axis, 105, 1, 60, "audit", COLOURS[2])
    box(axis, 205, 1, 60, "audit", COLOURS[2])
    notes = (
        (-50, "the model as it is written\nagainst the model as it trains"),
        (every, f"cross-check, every {every} steps:\nranks against one another"),
    )
    for x, text in notes:
        axis.annotate(text, (x, -0.4), (x, -1.5), ha="center", va="center", fontsize=9, arrowprops={"arrowstyle": "-"})
    axis.text(280, 1, "afterwards, by anyone: steps again from a checkpoint", va="center", fontsize=9)
    axis.set_yticks([0, 1], ["the run", "later"])
    axis.set_ylim(-2.2, 1.6)
    bare(axis, "")
    return figure


def files() -> Figure:
    """What a run writes, and who reads it."""
    written = ("recipe.yaml", "metrics.jsonl", "status.json", "checkpoints")
    readers = {
        "watch, report, compare": (1, 2),
        "TensorBoard, W&B, MLflow": (1,),
        "your script": (0, 1, 2, 3),
        "resume, audit": (0, 1, 3),
        "evaluate, predict, export": (0, 3),
    }
    figure, (axis,) = panels(1, (9.5, 2.6))
    box(axis, 0, 2, 1.2, "train", COLOURS[0])
    for row, name in enumerate(written):
        axis.plot([1.2, 2], [2, row + 0.5], color="grey", linewidth=1)
        box(axis, 2, row + 0.5, 1.6, name, COLOURS[1])
    for row, (name, reads) in enumerate(readers.items()):
        for at in reads:
            axis.plot([3.6, 4.8], [at + 0.5, row], color="grey", linewidth=1)
        box(axis, 4.8, row, 2.6, name, COLOURS[2])
    axis.set_yticks([])
    axis.set_xlim(0, 7.4)
    bare(axis, "")
    return figure


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for draw in (clock, order, workers, sums, edge, proof, files):
        picture, figure = out / f"{draw.__name__}.png", draw()
        figure.tight_layout()
        figure.savefig(picture, dpi=DPI)
        print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else PICTURES)
