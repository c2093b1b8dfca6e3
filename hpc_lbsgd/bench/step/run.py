"""`bench step`: a training step of ours beside those of the peers, on synthetic pictures."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from statistics import median

from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.bench.core.launches import Contender
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.world import cores
from hpc_lbsgd.report import figures

METRIC = "images/s over all ranks; whole steps on the slowest rank, mean of a launch, median over rounds"
FEWEST_ROUNDS = 5  # below it the output says that nothing should be concluded
PARTS = ("forward_s", "backward_s", "exposed_comm_s", "optimizer_s")

# (engine, mode, is it what a user gets without asking); the modes of ours are recipe settings
WAYS = {
    "hpc_lbsgd": ("hpc_lbsgd", "buckets", True),
    "hpc_lbsgd-fusion": ("hpc_lbsgd", "fusion", False),
    "hpc_lbsgd-fp16": ("hpc_lbsgd", "fp16", False),
    "hpc_lbsgd-any-ranks": ("hpc_lbsgd", "any-ranks", False),
    "horovod-stock": ("horovod-stock", "as shipped", True),
    "horovod-tuned": ("horovod-tuned", "our settings", False),
    "ddp": ("ddp", "as shipped", True),
    "none": ("none", "one process", True),
}
DEFAULT_WAYS = [way for way in WAYS if way not in ("hpc_lbsgd-fp16", "hpc_lbsgd-any-ranks")]


def task_of(
    ranks: int, batches: list[int], model: str, image_size: int, precision: str, warm_ups: int, steps: int,
    threads: int | None,
) -> dict:  # fmt: skip
    """What the ranks of `step_ranks` are told, but for the way. threads: of a CPU rank; None shares the cores out."""
    return {"model": model, "image_size": image_size, "precision": precision, "batches": batches,
            "warm_ups": warm_ups, "steps": steps, "threads": threads or max(1, cores() // ranks)}  # fmt: skip


def contender(way: str, ranks: int, task: dict, on_gpu: bool) -> Contender:
    """`horovod-tuned` is stock Horovod with the settings that our engine makes for itself."""
    from hpc_lbsgd.parallel.horovod_engine import defaults

    engine, mode, _ = WAYS[way]
    settings = defaults(on_gpu) if way == "horovod-tuned" else {}
    return Contender(way, settings, task | {"engine": engine, "mode": mode}, 1 if way == "none" else ranks)


def choose(ways: list[str] | None) -> list[str]:
    for way in ways or ():
        if way not in WAYS:
            raise RequestError(f"--engines {way}: allowed are {', '.join(WAYS)}")
    return ways or DEFAULT_WAYS


def check(task: dict, ways: list[str], ranks: int) -> None:
    """Raises RequestError, before anything starts, for what no recipe could say."""
    from hpc_lbsgd.bench.step.ways import recipe_of

    for way in ways:
        recipe_of(task | {"mode": WAYS[way][1]}, ranks, task["batches"][0])


def measure(ways: list[str], ranks: int, task: dict, rounds: int, timeout_s: float, oversubscribe: bool) -> dict:
    """Launch all in turn, and summarise."""
    import torch

    listed = [contender(way, ranks, task, torch.cuda.is_available()) for way in ways]
    found: dict[tuple[str, int], list[dict]] = {}
    conditions = {}
    for who, result in launches.in_turn("hpc_lbsgd.bench.step.measure", listed, rounds, timeout_s, oversubscribe):
        conditions[who.name] = {k: v for k, v in result.items() if k != "rows"}
        for row in result["rows"]:
            found.setdefault((who.name, row["batch"]), []).append(row | {"ranks": result["ranks"]})
    return summarise(found, task, rounds, conditions)


def summarise(found: dict[tuple[str, int], list[dict]], task: dict, rounds: int, conditions: dict) -> dict:
    """Rows and ratios from launches by (way, batch). Pure."""
    rows = []
    for (way, batch), launched in found.items():
        engine, mode, default = WAYS[way]
        rates = [r["ranks"] * batch / r["step_s"] for r in launched]
        parts = {p: median(r[p] for r in launched) for p in PARTS}
        rows.append(
            {
                "way": way,
                "engine": engine,
                "mode": mode,
                "default": default,
                "ranks": launched[0]["ranks"],
                "batch": batch,
                "images_per_s": median(rates),
                "images_per_s_low": min(rates),
                "images_per_s_high": max(rates),
                "step_s": median(r["step_s"] for r in launched),
                **parts,
                "exposed_comm_share": parts["exposed_comm_s"] / sum(parts.values()),
            }
        )
    return {
        "metric": METRIC,
        "baseline": "each peer, at the same batch",
        "machine": socket.gethostname(),
        "model": task["model"],
        "image_size": task["image_size"],
        "rounds": rounds,
        "conditions": conditions,
        "rows": rows,
        "ratios": ratios(found),
    }


def ratios(found: dict[tuple[str, int], list[dict]]) -> list[dict]:
    """Images/s of ours over each peer's, a rank, round by round: launches of one round ran next to each other."""
    result = []
    for (way, batch), ours in found.items():
        if way != "hpc_lbsgd":
            continue
        for (peer, peers_batch), theirs in found.items():
            if peer == way or peers_batch != batch:
                continue
            each = [t["step_s"] / o["step_s"] for o, t in zip(ours, theirs, strict=True)]
            result.append(
                {"batch": batch, "over": peer, "ratio": median(each), "ratio_low": min(each), "ratio_high": max(each)}
            )
    return result


# ---------------------------------------------------------------- showing


def show(result: dict) -> str:
    lines = [f"{result['model']}, {result['image_size']} pixels, {result['rounds']} rounds; milliseconds of a step", ""]
    lines.append(
        f"  {'way':22s} ranks  batch   images/s      low     high     step  forward backward  exposed  optimizer"
    )
    for r in sorted(result["rows"], key=lambda r: (r["batch"], r["way"])):
        lines.append(
            f"  {r['way']:22s} {r['ranks']:5d} {r['batch']:6d} {r['images_per_s']:10.1f} {r['images_per_s_low']:8.1f} "
            f"{r['images_per_s_high']:8.1f} {1e3 * r['step_s']:8.2f} " + " ".join(f"{1e3 * r[p]:8.2f}" for p in PARTS)
        )
    lines += ["", "  hpc_lbsgd over each, a rank: median of the rounds, lowest and highest"]
    lines += [
        f"    batch {r['batch']:5d}  {r['over']:22s} {r['ratio']:6.3f}  {r['ratio_low']:.3f} to {r['ratio_high']:.3f}"
        for r in result["ratios"]
    ]
    if result["rounds"] < FEWEST_ROUNDS:
        lines.append(f"  fewer than {FEWEST_ROUNDS} rounds: conclude nothing")
    return "\n".join(lines)


def plot(path: Path, result: dict) -> None:
    """A step's parts, stacked, a bar a way; one panel a batch size."""
    batches = sorted({r["batch"] for r in result["rows"]})
    figure, axes = figures.panels(len(batches), (5.5 * len(batches), 4.2))
    for axis, batch in zip(axes, batches, strict=True):
        rows = [r for r in result["rows"] if r["batch"] == batch]
        bottom = [0.0] * len(rows)
        for part in PARTS:
            heights = [1e3 * r[part] for r in rows]
            axis.bar([r["way"] for r in rows], heights, bottom=bottom, label=part.removesuffix("_s"))
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axis.set(title=f"batch {batch}", ylabel="milliseconds")
        axis.tick_params(axis="x", labelrotation=40, labelsize=7)
        axis.legend(fontsize=7)
    figures.save(figure, path)


def step(
    ranks: int, task: dict, ways: list[str] | None, rounds: int, timeout_s: float, oversubscribe: bool,
    picture: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """The command: measure, print, and draw where asked to."""
    ways = choose(ways)
    check(task, ways, ranks)
    result = measure(ways, ranks, task, rounds, timeout_s, oversubscribe)
    print(json.dumps(result) if as_json else show(result))
    if picture:
        plot(picture, result)
