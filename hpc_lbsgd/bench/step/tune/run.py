"""Machine keys of the gradient path, searched for a file that recipes include.

Weights do not depend on these keys; keys of a recipe's result part are never searched.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Hashable
from pathlib import Path

from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.bench.core.launches import Contender, Progress
from hpc_lbsgd.bench.core.spread import spread
from hpc_lbsgd.bench.core.task import CLASSES, recipe_of
from hpc_lbsgd.bench.step.run import PROGRAM, parts_of
from hpc_lbsgd.bench.step.tune.search import Launched, Search, Setting, Trial, judge, most_launches, said, search
from hpc_lbsgd.bench.step.tune.show import WIRE, to_yaml
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Machine
from hpc_lbsgd.schedulers.known import hosts

METRIC = "seconds of a step on the slowest rank, mean of a launch; ratios of one round, median over rounds"

GROUPS: dict[str, list[Setting]] = {
    "buckets": [{"bucket_mb": mb} for mb in (1.0, 5.0, 10.0, 50.0, 100.0)],
    "first-bucket": [{"first_bucket_mb": mb} for mb in (0.1, 0.25, 5.0, 25.0)],
    "fusion": [{"reduction": "fusion", "fusion_threshold_mb": mb} for mb in (128.0, 32.0, 8.0)],
    "cycle": [{"cycle_time_ms": ms} for ms in (0.05, 0.1, 0.5, 1.0, 2.5)],
    "yield": [{"yield_when_idle": choice} for choice in (False, True)],
    "allreduce": [{"allreduce": name} for name in ("hierarchical", "torus")],
}


def choose(names: list[str], on_gpu: bool, nodes: int) -> dict[str, list[Setting]]:
    """The groups to sweep; sums in two levels only where there are two, and where NCCL makes them.

    Raises RequestError for a name that is none.
    """
    for name in names:
        if name not in (*GROUPS, "all"):
            raise RequestError(f"--tune {name}: allowed are {', '.join(GROUPS)}, all")
    possible = [g for g in GROUPS if g != "allreduce" or (on_gpu and nodes > 1)]
    if "all" in names:
        return {g: GROUPS[g] for g in possible}
    if "allreduce" in names and "allreduce" not in possible:
        raise RequestError(f"--tune allreduce: only with GPUs on several nodes; here: {nodes} node, GPUs: {on_gpu}")
    return {g: GROUPS[g] for g in names}


def effect_of(task: dict, on_gpu: bool) -> Callable[[Setting], Hashable]:
    """What a setting does to the task's model: where its gradients are cut, and the values that hold."""
    from hpc_lbsgd.parallel.layout import plan_layouts
    from hpc_lbsgd.train import models

    model = models.without_storage(recipe_of(task, 1, task["batches"][0]), CLASSES)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    total_mb = sum(p.numel() * p.element_size() for _, p in parameters) / 2**20

    def effect(setting: Setting) -> Hashable:
        machine = Machine(**setting)
        if machine.reduction == "fusion":
            cuts = min(machine.fusion_threshold_mb, total_mb)
        else:
            limits = machine.bucket_mb * 2**20, min(machine.bucket_mb, machine.first_bucket_mb) * 2**20
            cuts = tuple(len(layout.views) for layout in plan_layouts(parameters, set(), 0, *limits))
        cycle_time_ms = machine.cycle_time_ms or (1.0 if on_gpu else 0.1)
        yields = (not on_gpu) if machine.yield_when_idle is None else machine.yield_when_idle
        return machine.reduction, cuts, cycle_time_ms, yields, machine.allreduce

    return effect


class Launches:
    """Measures settings on real ranks, in turn. left: how many launches follow those of a group."""

    def __init__(self, ranks: int, task: dict, timeout_s: float, oversubscribe: bool, left: Callable[[str], int]):
        self.ranks, self.task, self.left = ranks, task, left
        self.limits, self.progress = (timeout_s, oversubscribe), Progress(0)

    def __call__(self, group: str, settings: list[Setting], rounds: int) -> list[list[Launched]]:
        self.progress.expect(len(settings) * rounds + self.left(group))
        return self.compare(group, [(said(s), {"machine": s}) for s in settings], rounds)

    def compare(self, group: str, changes: list[tuple[str, dict]], rounds: int) -> list[list[Launched]]:
        """Launches by change and round; a change is a name, and what the task has more."""
        task = self.task | {"engine": "hpc_lbsgd"}
        contenders = [Contender(f"{group}: {name}", {}, task | change, self.ranks) for name, change in changes]
        found: dict[str, list[Launched]] = {c.name: [] for c in contenders}
        for who, result in launches.in_turn(PROGRAM, contenders, rounds, *self.limits, self.progress):
            rows = {row["batch"]: row | {"ranks": result["ranks"]} for row in result["rows"]}
            found[who.name].append(Launched(rows, result["settings"]))
        return list(found.values())


def summarise(found: Search, task: dict, ranks: int, rounds: int) -> dict:
    return {
        "metric": METRIC,
        "baseline": "the best setting of the groups before; confirmation: the defaults",
        "machine": socket.gethostname(),
        "model": task["model"],
        "image_size": task["image_size"],
        "precision": task["precision"],
        "threads": task["threads"],
        "ranks": ranks,
        "rounds": rounds,
        "rows": [row for trial in found.trials for row in rows_of(trial)],
        "tuned": found.best,
    }


def rows_of(trial: Trial) -> list[dict]:
    """A row a batch; the ratio is over all batches."""
    v, rows = trial.verdict, []
    for batch in trial.launched[0].rows:
        each = [launched.rows[batch] for launched in trial.launched]
        step_s = spread("step_s", (r["step_s"] for r in each))
        rows.append(
            {
                "engine": "hpc_lbsgd",
                "mode": trial.setting.get("reduction", "buckets"),
                "default": not trial.setting,
                "group": trial.group,
                "setting": trial.setting,
                "ranks": each[0]["ranks"],
                "batch": batch,
                "images_per_s": each[0]["ranks"] * batch / step_s["step_s"],
                **step_s,
                "exposed_comm_share": parts_of(each)["exposed_comm_share"],
                "ratio": v.ratio,
                "ratio_low": v.low,
                "ratio_high": v.high,
                "rounds": v.rounds,
                "wins": v.wins,
                "environment": trial.launched[-1].environment,
            }
        )
    return rows


def tune(
    ranks: int, task: dict, names: list[str], fp16: bool, rounds: int, timeout_s: float, oversubscribe: bool, out: Path
) -> dict:  # fmt: skip
    """Everything that the command reports, with the file written."""
    import torch

    on_gpu = torch.cuda.is_available()
    task = task | {"mode": "buckets"}
    groups = choose(names, on_gpu, max(1, len(hosts())))
    launches.check_file("--out", out)
    effect = effect_of(task, on_gpu)  # refuses a wrong model before anything starts

    def left(group: str) -> int:
        """At most: what is offered twice or loses early is not launched."""
        wire = 2 * rounds * fp16
        if group not in groups:  # the confirmation
            return wire
        names = list(groups)
        return most_launches({g: groups[g] for g in names[names.index(group) + 1 :]}, rounds) + wire

    measure = Launches(ranks, task, timeout_s, oversubscribe, left)
    found = search(groups, rounds, measure, effect)
    if fp16:
        best = {"machine": found.best}
        measure.progress.expect(2 * rounds)
        fp32, half = measure.compare("wire", [("fp32", best), ("fp16", best | {"mode": "fp16"})], rounds)
        found.trials.append(Trial(WIRE, found.best, judge(fp32, half), half))
    result = summarise(found, task, ranks, rounds)
    out.write_text(to_yaml(result))
    return result | {"file": str(out)}
