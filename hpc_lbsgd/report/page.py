"""`report FOLDER [FOLDER ...]`: one HTML page that needs nothing else, and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import NamedTuple, TypeVar

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import flatten
from hpc_lbsgd.records import write_atomically
from hpc_lbsgd.report import curves
from hpc_lbsgd.report.facts import SECONDS, Facts, by_batch, by_ranks, facts
from hpc_lbsgd.report.study import Study, efficiency, study

T = TypeVar("T", Facts, Study)
FORMATS = ("png", "svg", "pdf")
ADVICE = {  # what most likely mends it, by what takes the time
    "data": "more decoding threads (machine.loader_threads), cores a rank, or a packed set (data pack)",
    "sums": "bench allreduce and bench step --tune show which settings fit; larger batches a rank hide more",
    "evaluation": "evaluate less often (train.eval_epochs), in larger passes (machine.eval_batch)",
    "checkpoint": "checkpoint less often (checkpoint.steps, checkpoint.minutes)",
    "start-up": "fewer, longer starts; packed data; an environment that lies on each node",
    "other": "time between records that none of them names: a machine that was stopped or shared",
}


def report(names: Sequence[str], out: Path | None = None, figures: Path | None = None, form: str = "png") -> Path:
    """Write the page of runs, overlaid, and of scaling studies, one after another; returns its file (default:
    FOLDER/report.html; of several report.html here). figures: a folder for each figure as a file, too, of `form`.

    Raises RequestError for what is neither, and what cannot be written.
    """
    found = [study(name) or facts(name) for name in names]
    runs = distinct([f for f in found if isinstance(f, Facts)])
    studies = distinct([f for f in found if isinstance(f, Study)])
    out = out or (found[0].folder / "report.html" if len(found) == 1 else Path("report.html"))
    try:
        write_atomically(out, render(runs, studies))
        if figures:
            figures.mkdir(parents=True, exist_ok=True)
            for drawing in drawings(runs, studies, "black"):
                drawing.canvas.save(figures / f"{drawing.name}.{form}")
    except OSError as problem:
        raise RequestError(f"{problem.filename or out}: cannot be written: {problem.strerror}") from None
    return out


def distinct(found: list[T]) -> list[T]:
    """Folders of one name are called by as much of their place as tells them apart."""
    places, depth = [f.folder.resolve().parts for f in found], 1
    while len({p[-depth:] for p in places}) < len(set(places)):
        depth += 1
    for f, parts in zip(found, places, strict=True):
        f.name = "/".join(parts[-depth:])
    return found


class Drawing(NamedTuple):
    name: str
    title: str
    says: str
    canvas: curves.Canvas


def drawings(runs: Sequence[Facts], studies: Sequence[Study], ink: str) -> Iterator[Drawing]:
    """Each figure that these runs and studies have something for."""
    for name, (title, says, figure) in curves.FIGURES.items():
        canvas = figure(runs, ink)
        if canvas:
            yield Drawing(name, title, says, canvas)
    for i, found in enumerate(studies, 1):
        title = "Efficiency" + (f": {found.name}" if len(studies) > 1 else "")
        says = "Images a second a rank, over the baseline's; bars: lowest and highest round."
        yield Drawing(f"study-{i}", title, says, efficiency(found, ink))


def render(runs: Sequence[Facts], studies: Sequence[Study]) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    template = (resources.files("hpc_lbsgd.report") / "page.html").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=", ".join(f.name for f in (*runs, *studies)),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        runs=[row(run, i) for i, run in enumerate(runs)],
        figures=[
            {"name": d.name, "title": d.title, "says": d.says, "svg": Markup(d.canvas.svg(d.name))}
            for d in drawings(runs, studies, curves.INK)
        ],
        studies=studies,
        parts=SECONDS,
        differences=differences(runs),
        efficiency=by_ranks(runs),
        errors=by_batch(runs),
    )


def row(run: Facts, i: int) -> dict:
    """What the page says of one run."""
    total = sum(run.seconds.values()) or 1.0
    slowest = max((p for p in SECONDS if p != "compute"), key=lambda p: run.seconds[p])
    share = run.seconds[slowest] / total
    last = run.starts[-1] if run.starts else None
    return {
        "name": run.name,
        "colour": curves.colour(i),
        "status": run.status,
        "steps": len(run.steps),
        "accuracy": None if run.accuracy is None else f"{run.accuracy:.2%}",
        "rate": None if run.images_per_s is None else f"{run.images_per_s:,.0f}",
        "ranks": last and f"{last.ranks} on {last.nodes} node{'s' if last.nodes > 1 else ''}",
        "device": last and last.device,
        "node_hours": f"{run.node_hours:.2f}",
        "starts": [
            {
                "attempt": s.attempt,
                "from": s.first_step,
                "ranks": s.ranks,
                "nodes": s.nodes,
                "engine": s.engine,
                "device": s.device,
                "time": f"{datetime.fromtimestamp(s.time):%Y-%m-%d %H:%M:%S}",
                "hours": f"{s.hours:.2f}",
            }
            for s in run.starts
        ],
        "events": [said(r) for r in run.events],
        "seconds": {p: (f"{run.seconds[p]:,.1f}", f"{run.seconds[p] / total:.1%}") for p in SECONDS},
        "advice": f"{slowest}: {share:.0%} of the time. {ADVICE[slowest]}" if share > 0.1 else None,
        "recipe": "\n".join(f"{k}: {json.dumps(v)}" for k, v in flatten(run.recipe).items()),
        "weights": run.weights_sha256,
    }


def said(event: dict) -> dict:
    """An event for a table: when, what, and the rest as it stands."""
    rest = {k: v for k, v in event.items() if k not in ("kind", "time", "event", "step")}
    facts = ", ".join(f"{k} {json.dumps(v)}" for k, v in rest.items())
    return {"step": event.get("step"), "event": event["event"], "facts": facts}


def differences(runs: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """Recipe keys in which these runs are not all alike, with each run's value."""
    flat = [flatten(run.recipe) for run in runs]
    keys = sorted({key for found in flat for key in found})
    values = ((key, [json.dumps(found.get(key)) for found in flat]) for key in keys)
    return [(key, found) for key, found in values if len(set(found)) > 1]
