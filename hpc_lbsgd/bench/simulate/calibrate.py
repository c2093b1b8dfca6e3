"""--calibrate A B --against C ...: the simulator calibrated with steps that were measured on few CPU
ranks, beside steps that were measured on more ranks than the machine has cores.

One rank gives the compute time. The other calibrating run, of up to a rank a core, gives what computing beside others
costs, and a bandwidth that makes the simulated exposed communication equal the measured one. Ranks that share a core
then compute, copy and add slower by as much as they share it. Nothing of the measurements in --against is used.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from hpc_lbsgd.bench.core.task import CLASSES, PARTS, recipe_of
from hpc_lbsgd.bench.simulate import presets, workload
from hpc_lbsgd.bench.simulate.from_run import matched_links
from hpc_lbsgd.bench.simulate.presets import GB, MB
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Machine
from hpc_lbsgd.theory import simulate as model
from hpc_lbsgd.theory.simulate import Cluster, Layer, Method, Protocol, System, Workload

METRIC = "seconds of a step of each rank, predicted and measured"
KEYS = ("machine", "model", "image_size", "threads", "cores")  # that all results must agree in


class Steps(NamedTuple):
    """One result of `bench step`: our way's rows by batch, and where they were measured."""

    path: Path
    ranks: int
    facts: dict
    rows: dict[int, dict]


# ---------------------------------------------------------------- reading


def read(path: Path) -> Steps:
    """Raises RequestError where the file is not what `bench step --json` prints of our default way on CPU ranks."""
    try:
        result = json.loads(path.read_text())
        where = result["conditions"]["hpc_lbsgd"]
        rows = {row["batch"]: row for row in result["rows"] if row["way"] == "hpc_lbsgd"}
        facts = {key: result[key] if key in result else where[key] for key in KEYS}
        device, ranks = where["device"], where["ranks"]
    except OSError as problem:
        raise RequestError(f"{path}: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise RequestError(
            f"{path}: not what `bench step --engines hpc_lbsgd --json` prints ({str(problem)[:80]})"
        ) from None
    if device != "cpu":
        raise RequestError(f"{path}: measured on {device}; ranks share cores only where they compute on CPUs")
    return Steps(path, ranks, facts, rows)


def merged(listed: list[Steps]) -> list[Steps]:
    """One for each number of ranks: results of one number of ranks are rounds that took turns with the others'."""
    found = []
    for ranks in sorted({steps.ranks for steps in listed}):
        same = [steps for steps in listed if steps.ranks == ranks]
        rows = {}
        for batch in set.intersection(*(set(steps.rows) for steps in same)):
            each = [steps.rows[batch] for steps in same]
            rows[batch] = {
                "batch": batch,
                **{key: median(row[key] for row in each) for key in ("step_s", *PARTS)},
                "images_per_s_low": min(row["images_per_s_low"] for row in each),
                "images_per_s_high": max(row["images_per_s_high"] for row in each),
            }
        found.append(same[0]._replace(rows=rows))
    return found


def places(steps: Steps) -> int:
    """Ranks that the machine has cores for."""
    return steps.facts["cores"] // steps.facts["threads"]


def check(calibrate: list[Steps], against: list[Steps]) -> None:
    """Raises RequestError for runs that do not belong together."""
    first = calibrate[0]
    for other in (*calibrate, *against):
        for key in KEYS:
            if other.facts[key] != first.facts[key]:
                raise RequestError(f"{other.path}: {key} = {other.facts[key]}, but {first.facts[key]} in {first.path}")
        missing = first.rows.keys() - other.rows.keys()
        if missing:
            raise RequestError(f"{other.path}: no batch {min(missing)}, which {first.path} has")
    ranks = sorted({steps.ranks for steps in calibrate})
    if len(ranks) != 2 or ranks[0] != 1 or not 1 < ranks[1] <= places(first):
        raise RequestError(
            f"--calibrate: results of {ranks} ranks; needed are one of 1 rank, and one of 2 to {places(first)} ranks, "
            "which have a core a thread"
        )


# ---------------------------------------------------------------- predicting, pure


def exposed_s(row: dict) -> float:
    """Of the whole step that was timed; its parts were timed in further steps."""
    return row["step_s"] * row["exposed_comm_s"] / sum(row[p] for p in PARTS)


def calibrated(alone: dict, beside: dict, layers: tuple[Layer, ...], ranks: int, cores: int) -> System:
    """From a row of one rank and a row of `ranks` ranks on one node, of as many `cores` as can have a rank each. What
    one rank waits for, with nobody to wait for, counts as compute."""
    share = {p: alone["step_s"] * alone[p] / sum(alone[q] for q in PARTS) for p in PARTS}
    work = Workload(
        layers, alone["batch"], share["forward_s"], share["backward_s"], share["optimizer_s"] + share["exposed_comm_s"]
    )
    machine = Machine()
    method = Method("ring", machine.bucket_mb * MB, machine.first_bucket_mb * MB, cycle_s=cycle_s())
    own = Cluster(ranks, GB, GB, (Protocol(0.0, 0.0),), cores=cores)
    # with fewer ranks than cores only part of the crowding is there
    in_use = (ranks - 1) / (cores - 1)
    slower = (beside["step_s"] - exposed_s(beside)) / alone["step_s"]
    system = System(work, replace(own, crowding=1 + (slower - 1) / in_use), method, presets.fitted())
    return replace(system, cluster=matched_links(system, 1, exposed_s(beside)))


def cycle_s() -> float:
    """Horovod's, as our engine sets it on CPU ranks."""
    from hpc_lbsgd.parallel.horovod_engine import defaults

    return float(defaults(on_gpu=False)["HOROVOD_CYCLE_TIME"]) / 1000


def on_ranks(system: System, ranks: int) -> System:
    return replace(system, cluster=replace(system.cluster, ranks_per_node=ranks))


def rows_of(system: System, batch: int, listed: list[Steps], used: set[int]) -> list[dict]:
    """Predicted and measured, by ranks. Efficiency: images/s a rank over those of one rank."""
    alone = next(steps.rows[batch] for steps in listed if steps.ranks == 1)
    reference = model.step(on_ranks(system, 1), 1).step_s
    found = []
    for steps in sorted(listed, key=lambda s: s.ranks):
        row, predicted = steps.rows[batch], model.step(on_ranks(system, steps.ranks), 1)
        efficiency, seen = reference / predicted.step_s, alone["step_s"] / row["step_s"]
        images = steps.ranks * batch
        found.append(
            {
                "batch": batch,
                "nodes": 1,
                "ranks": steps.ranks,
                "ranks_per_core": on_ranks(system, steps.ranks).cluster.ranks_per_core,
                "calibrated": steps.ranks in used,
                "step_s": predicted.step_s,
                "exposed_comm_s": predicted.exposed_comm_s,
                "measured_step_s": row["step_s"],
                "measured_step_s_low": images / row["images_per_s_high"],
                "measured_step_s_high": images / row["images_per_s_low"],
                "measured_exposed_comm_s": exposed_s(row),
                "error": predicted.step_s / row["step_s"] - 1,
                "efficiency": efficiency,
                "measured_efficiency": seen,
                "error_points": 100 * (efficiency - seen),
            }
        )
    return found


# ---------------------------------------------------------------- the comparison


def compare(calibrate: list[Path] | None, against: list[Path] | None) -> dict:
    """Everything that the command reports."""
    if not calibrate or not against:
        raise RequestError("--calibrate and --against go together: results to learn from, and results to predict")
    learnt, unseen = [read(p) for p in calibrate], [read(p) for p in against]
    check(learnt, unseen)
    learnt, unseen = merged(learnt), merged(unseen)
    alone, beside = learnt
    layers = layers_of_model(alone.facts["model"], alone.facts["image_size"])
    rows, constants = [], []
    for batch in sorted(alone.rows):
        system = calibrated(alone.rows[batch], beside.rows[batch], layers, beside.ranks, places(alone))
        rows += rows_of(system, batch, [*learnt, *unseen], {s.ranks for s in learnt})
        w, c = system.workload, system.cluster
        constants.append(
            {
                "batch": batch,
                **{key: getattr(w, key) for key in ("forward_s", "backward_s", "other_s")},
                "crowding": c.crowding,
                "usable_gbyte_per_s": c.intra * system.fitted.protocol_efficiency / GB,
            }
        )
    return {
        "metric": METRIC,
        "baseline": "1 rank",
        "calibrated_on_ranks": [alone.ranks, beside.ranks],
        **alone.facts,
        "rows": rows,
        "constants": constants,
    }


def layers_of_model(name: str, image_size: int) -> tuple[Layer, ...]:
    task = {"mode": "buckets", "model": name, "image_size": image_size, "precision": "float32"}
    return workload.layers(recipe_of(task, 1, 1), CLASSES)
