"""A training step of ours beside those of the peers: who takes part, launches in turn, rows and ratios."""

from __future__ import annotations

import socket
from statistics import median

from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.bench.core.launches import Contender
from hpc_lbsgd.bench.core.spread import by_round, spread
from hpc_lbsgd.bench.core.task import PARTS, recipe_of
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.world import cores

METRIC = "images/s over all ranks; whole steps on the slowest rank, mean of a launch, median over rounds"
PROGRAM = "hpc_lbsgd.bench.step.measure"

# (engine, mode, is it what a user gets without asking); the modes of ours are recipe settings
WAYS = {
    "hpc_lbsgd": ("hpc_lbsgd", "buckets", True),
    "hpc_lbsgd-fusion": ("hpc_lbsgd", "fusion", False),
    "hpc_lbsgd-fp16": ("hpc_lbsgd", "fp16", False),
    "hpc_lbsgd-any-ranks": ("hpc_lbsgd", "any-ranks", False),
    "hpc_lbsgd-int32": ("hpc_lbsgd", "any-ranks int32", False),
    "hpc_lbsgd-torch": ("hpc_lbsgd", "torch", False),
    "horovod-stock": ("horovod-stock", "as shipped", True),
    "horovod-tuned": ("horovod-tuned", "our settings", False),
    "ddp": ("ddp", "as shipped", True),
    "none": ("none", "one process", True),
}
ON_REQUEST = ("hpc_lbsgd-fp16", "hpc_lbsgd-any-ranks", "hpc_lbsgd-int32", "hpc_lbsgd-torch")
DEFAULT_WAYS = [way for way in WAYS if way not in ON_REQUEST]


def task_of(
    ranks: int, batches: list[int], model: str, image_size: int, precision: str, warm_ups: int, steps: int,
    threads: int | None,
) -> dict:  # fmt: skip
    """What the ranks of `measure` are told, but for the way. threads: of a CPU rank; None shares the cores out."""
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
    for way in ways:
        recipe_of(task | {"mode": WAYS[way][1]}, ranks, task["batches"][0])


def measure(ways: list[str], ranks: int, task: dict, rounds: int, timeout_s: float, oversubscribe: bool) -> dict:
    """Launch all in turn, and summarise."""
    import torch

    listed = [contender(way, ranks, task, torch.cuda.is_available()) for way in ways]
    found: dict[tuple[str, int], list[dict]] = {}
    conditions = {}
    for who, result in launches.in_turn(PROGRAM, listed, rounds, timeout_s, oversubscribe):
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
        rows.append(
            {
                "way": way,
                "engine": engine,
                "mode": mode,
                "default": default,
                "ranks": launched[0]["ranks"],
                "batch": batch,
                **spread("images_per_s", rates),
                "step_s": median(r["step_s"] for r in launched),
                **parts_of(launched),
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


def parts_of(launched: list[dict]) -> dict[str, float]:
    """Medians of a step's parts over launches, and the share of them that waits for sums."""
    parts = {p: median(r[p] for r in launched) for p in PARTS}
    return {**parts, "exposed_comm_share": parts["exposed_comm_s"] / sum(parts.values())}


def ratios(found: dict[tuple[str, int], list[dict]]) -> list[dict]:
    """Images/s of ours over each peer's, a rank, round by round: launches of one round ran next to each other."""
    result = []
    for (way, batch), ours in found.items():
        if way != "hpc_lbsgd":
            continue
        for (peer, peers_batch), theirs in found.items():
            if peer == way or peers_batch != batch:
                continue
            each = by_round((t["step_s"] for t in theirs), (o["step_s"] for o in ours))
            result.append({"batch": batch, "over": peer, **spread("ratio", each)})
    return result


def step(ranks: int, task: dict, ways: list[str] | None, rounds: int, timeout_s: float, oversubscribe: bool) -> dict:
    """Everything that the command reports."""
    ways = choose(ways)
    check(task, ways, ranks)
    return measure(ways, ranks, task, rounds, timeout_s, oversubscribe)
