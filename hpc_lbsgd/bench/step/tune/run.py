"""`bench step --tune`: one search over the machine keys of the gradient path, for a file that recipes include.

Group after group of keys is swept around the best setting so far. A setting takes its place only if it is faster by
more than the spread between rounds, and what remains at the end must win once more, in new launches, against the
defaults: the fastest of many noisy measurements is partly the luckiest. Weights do not depend on these keys; keys of
a recipe's result part are never searched.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Hashable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import yaml

from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.bench.core.launches import Contender, Progress
from hpc_lbsgd.bench.step.run import PARTS
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Machine

METRIC = "seconds of a step on the slowest rank, mean of a launch; ratios of one round, median over rounds"
SCREENING_ROUNDS = 2  # that all settings of a group run; the better half runs the rest
FEWEST_ROUNDS = 3  # below it there is no spread to speak of, and nothing wins
WIRE = "wire fp16"

Setting = dict  # machine keys that differ from their defaults
GROUPS: dict[str, list[Setting]] = {
    "buckets": [{"bucket_mb": mb} for mb in (1.0, 5.0, 10.0, 50.0, 100.0)],
    "first-bucket": [{"first_bucket_mb": mb} for mb in (0.1, 0.25, 5.0, 25.0)],
    "fusion": [{"reduction": "fusion", "fusion_threshold_mb": mb} for mb in (128.0, 32.0, 8.0)],
    "cycle": [{"cycle_time_ms": ms} for ms in (0.05, 0.1, 0.5, 1.0, 2.5)],
    "yield": [{"yield_when_idle": choice} for choice in (False, True)],
    "allreduce": [{"allreduce": name} for name in ("hierarchical", "torus")],
}


class Launched(NamedTuple):
    """One launch of one setting: its rows by batch, and what its ranks found in their environment."""

    rows: dict[int, dict]
    environment: dict[str, str]


class Verdict(NamedTuple):
    """How many times as fast a setting is as what it was held against, in the same round."""

    ratio: float  # median over rounds
    low: float
    high: float
    rounds: int

    @property
    def wins(self) -> bool:
        """Faster by more than the spread; so it is faster in every round."""
        return self.rounds >= FEWEST_ROUNDS and self.ratio - 1 > self.high - self.low


class Trial(NamedTuple):
    group: str
    setting: Setting
    verdict: Verdict
    launched: list[Launched]


class Search(NamedTuple):
    best: Setting
    trials: list[Trial]


# ---------------------------------------------------------------- the search, pure


def judge(held_against: list[Launched], setting: list[Launched]) -> Verdict:
    """Round by round; over several batches the geometric mean of their ratios."""

    def ratio(before: Launched, after: Launched) -> float:
        logs = [math.log(before.rows[b]["step_s"] / row["step_s"]) for b, row in after.rows.items()]
        return math.exp(sum(logs) / len(logs))

    each = [ratio(*pair) for pair in zip(held_against, setting, strict=True)]
    return Verdict(median(each), min(each), max(each), len(each))


def sweep(
    group: str, best: Setting, offered: list[Setting], rounds: int, measure: Callable[[str, list[Setting], int], list]
) -> list[Trial]:
    """Every setting against `best` in the same rounds; after the screening only the better half of them."""
    screening = min(SCREENING_ROUNDS, rounds)
    reference, *found = measure(group, [best, *offered], screening)
    order = sorted(range(len(offered)), key=lambda i: judge(reference, found[i]).ratio, reverse=True)
    kept = [i for i in order if judge(reference, found[i]).ratio > 1][: math.ceil(len(offered) / 2)]
    if kept and rounds > screening:
        more, *further = measure(group, [best, *(offered[i] for i in kept)], rounds - screening)
        for i, launched in zip(kept, further, strict=True):
            found[i] = found[i] + launched
        reference = reference + more
    return trials_of(group, reference, best, offered, found)


def trials_of(
    group: str, reference: list[Launched], best: Setting, settings: list[Setting], found: list[list[Launched]]
) -> list[Trial]:
    """What settings are held against, and each of them; some have fewer rounds."""
    return [
        Trial(group, setting, judge(reference[: len(launched)], launched), launched)
        for setting, launched in zip([best, *settings], [reference, *found], strict=True)
    ]


def search(
    groups: dict[str, list[Setting]],
    rounds: int,
    measure: Callable[[str, list[Setting], int], list],
    effect: Callable[[Setting], Hashable],
) -> Search:
    """measure: (group, settings, rounds) to launches by setting and round. effect: what a setting does; settings with
    one effect are tried once."""
    best: Setting = {}
    trials: list[Trial] = []
    for group, candidates in groups.items():
        seen, offered = {effect(best)}, []
        for setting in (tidy(best | candidate) for candidate in candidates):
            if effect(setting) not in seen:
                offered.append(setting)
                seen.add(effect(setting))
        if not offered:
            continue
        tried = sweep(group, best, offered, rounds, measure)
        trials += tried
        winners = [t for t in tried if t.verdict.wins]
        best = max(winners, key=lambda t: t.verdict.ratio).setting if winners else best
    if best:
        defaults, launched = measure("confirmation", [{}, best], rounds)
        trials += trials_of("confirmation", defaults, {}, [best], [launched])
        best = best if trials[-1].verdict.wins else {}
    return Search(best, trials)


def tidy(setting: Setting) -> Setting:
    """Without keys that fusion makes meaningless."""
    idle = ("bucket_mb", "first_bucket_mb") if setting.get("reduction") == "fusion" else ()
    return {k: v for k, v in setting.items() if k not in idle}


def most_launches(groups: dict[str, list[Setting]], rounds: int) -> int:
    screening = min(SCREENING_ROUNDS, rounds)
    swept = [screening * (1 + len(c)) + (rounds - screening) * (1 + math.ceil(len(c) / 2)) for c in groups.values()]
    return sum(swept) + 2 * rounds


# ---------------------------------------------------------------- what settings do here


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
    from hpc_lbsgd.bench.simulate.workload import model_without_storage
    from hpc_lbsgd.bench.step.ways import CLASSES, recipe_of
    from hpc_lbsgd.parallel.buckets import plan_layouts

    model = model_without_storage(recipe_of(task, 1, task["batches"][0]), CLASSES)
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


def said(setting: Setting) -> str:
    return ", ".join(f"{k} {v}" for k, v in setting.items()) or "default"


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
        program = "hpc_lbsgd.bench.step.measure"
        for who, result in launches.in_turn(program, contenders, rounds, *self.limits, self.progress):
            rows = {row["batch"]: row | {"ranks": result["ranks"]} for row in result["rows"]}
            found[who.name].append(Launched(rows, result["settings"]))
        return list(found.values())


# ---------------------------------------------------------------- showing


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
        step_s, parts = median(r["step_s"] for r in each), {p: median(r[p] for r in each) for p in PARTS}
        rows.append(
            {
                "engine": "hpc_lbsgd",
                "mode": trial.setting.get("reduction", "buckets"),
                "default": not trial.setting,
                "group": trial.group,
                "setting": trial.setting,
                "ranks": each[0]["ranks"],
                "batch": batch,
                "images_per_s": each[0]["ranks"] * batch / step_s,
                "step_s": step_s,
                "step_s_low": min(r["step_s"] for r in each),
                "step_s_high": max(r["step_s"] for r in each),
                "exposed_comm_share": parts["exposed_comm_s"] / sum(parts.values()),
                "ratio": v.ratio,
                "ratio_low": v.low,
                "ratio_high": v.high,
                "rounds": v.rounds,
                "wins": v.wins,
                "environment": trial.launched[-1].environment,
            }
        )
    return rows


def show(result: dict) -> str:
    lines = [
        f"{result['model']}, {result['image_size']} pixels, {result['ranks']} ranks of {result['threads']} threads; "
        "milliseconds of a step; ratio: times as fast as the best before it",
        "",
        f"  {'group':13s} {'setting':46s} batch     step      low     high  rounds   ratio  low to high",
    ]
    for r in result["rows"]:
        lines.append(
            f"  {r['group']:13s} {said(r['setting']):46s} {r['batch']:5d} {1e3 * r['step_s']:8.2f} "
            f"{1e3 * r['step_s_low']:8.2f} {1e3 * r['step_s_high']:8.2f} {r['rounds']:7d} {r['ratio']:7.3f}  "
            f"{r['ratio_low']:.3f} to {r['ratio_high']:.3f}{'  wins' if r['wins'] else ''}"
        )
    lines += ["", f"  {conclusion(result)}"]
    if any(r["group"] == WIRE for r in result["rows"]):
        lines.append("  the fp16 wire changes results, so it is not in the file: wire: fp16 is for the recipe to say")
    return "\n".join(lines)


def conclusion(result: dict) -> str:
    """One sentence: what holds from here on, and why."""
    if result["tuned"]:
        final = next(r for r in result["rows"] if r["group"] == "confirmation" and r["setting"])
        return (
            f"{said(result['tuned'])}: {final['ratio']:.3f} times as fast as the defaults "
            f"({final['ratio_low']:.3f} to {final['ratio_high']:.3f} in {final['rounds']} rounds)"
        )
    few = f"; fewer than {FEWEST_ROUNDS} rounds, so nothing could win" if result["rounds"] < FEWEST_ROUNDS else ""
    return f"the defaults stay: no setting was faster by more than the spread between rounds{few}"


def to_yaml(result: dict) -> str:
    """A file for a recipe's `machine: FILE` or `--set machine=FILE`."""
    batches = sorted({r["batch"] for r in result["rows"]})
    head = [
        "hpc-lbsgd bench step --tune: " + conclusion(result),
        f"{result['model']}, {result['image_size']} pixels, {result['precision']}, batch "
        f"{', '.join(map(str, batches))} a rank, {result['ranks']} ranks; holds for this machine, model and batch",
    ]
    section = yaml.safe_dump({"machine": result["tuned"]}, sort_keys=False)
    return "".join(f"# {line}\n" for line in head) + section


def tune(
    ranks: int, task: dict, names: list[str], fp16: bool, rounds: int, timeout_s: float, oversubscribe: bool, out: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """The command: search, print, and write the file."""
    import torch

    on_gpu = torch.cuda.is_available()
    task = task | {"mode": "buckets"}
    groups = choose(names, on_gpu, int(os.environ.get("SLURM_JOB_NUM_NODES", 1)))
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
    if as_json:
        print(json.dumps(result | {"file": str(out)}))
    else:
        print(show(result))
        print(f"  written to {out}: take it with `machine: {out}` in a recipe, or --set machine={out}")
