"""A plan for a person."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from hpc_lbsgd.amend import said
from hpc_lbsgd.outline import render
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.train.display import duration

TRIAL_STEPS = 20


def said_of_prediction(predicted: dict | None) -> list[str]:
    if not predicted:
        return []
    knee = f"below 90 % from {predicted['knee_nodes']} nodes on, set by {predicted['knee_set_by']}"
    return [
        f"  predicted      on {predicted['system']}: {1e3 * predicted['step_s']:.1f} ms a step, "
        f"{predicted['images_per_s']:.0f} images/s, {predicted['efficiency']:.1%} of one node's rate a rank; "
        + (knee if predicted["knee_nodes"] else "above 90 % up to 4096 nodes")
    ]


def told(hours: float | None, width: int, places: int) -> str:
    return f"{hours:{width}.{places}f}" if hours is not None else f"{'?':>{width}}"


def said_of_place(p: dict, recipe_words: Sequence[str]) -> list[str]:
    """Where the ranks are, what they send, and how long it takes on this machine."""
    ranks, rate, run = p["ranks"], p["images_per_s_per_rank"], p["images_per_s_of"]
    kind = "assumed: an A100's; --images-per-s says yours" if p["images_per_s_assumed"] else "given"
    kind = f"as {run} went here" if run else kind
    sent = f"  gradients      {p['parameters'] / 1e6:.1f} M parameters, {p['gradient_bytes'] / 1e6:.1f} MB a step"
    if rate:
        speed = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
        sent += f"; to hide behind backward at {speed} images/s a rank ({kind}): {p['required_gbit_per_s']:.1f} Gbit/s "
        sent += "a rank"
    if not p["here"]:
        words = "(--nodes, --gpus-per-node; without GPUs: cores)"
        return [f"  nodes          {p['nodes']} of {p['gpus_per_node']} GPUs {words}", sent]
    gpus = p["here"] == "cuda"
    word = ("GPU" if gpus else "core") + "s" * (ranks > 1)
    place = f"{ranks} {word}{'' if gpus else ', no GPU'}: a rank a {word.rstrip('s')}"
    if rate:
        time = f"{duration(3600 * p['jobs'][0]['hours'])} at {speed} images/s a rank ({kind}; "
        time += "data and sums in it, evaluations not)" if run else "compute only)"
    else:
        trial = ["launch", "--np", str(ranks), "--oversubscribe", "--", "train", *recipe_words]
        time = (
            f"not known: no run of this work on {ranks} {word} of this host in runs/; try it, and plan again:\n"
            f"    {shlex.join(['hpc-lbsgd', *trial, '--set', f'train.max_steps={TRIAL_STEPS}'])}"
        )
    return [f"  here           {place} (others: --nodes, --gpus-per-node)", sent, f"  time           {time}"]


def show(name: str, recipe: Recipe, p: dict, recipe_words: Sequence[str] = ("RECIPE",)) -> str:
    """All that `plan.plan` found, as a page. recipe_words: the recipe, as a command names it."""
    lines = [render(name, p, recipe.with_workers(p["ranks"]))]
    lines += [
        *said_of_place(p, recipe_words),
        *said_of_prediction(p.get("predicted")),
        *(f"  amended        {said(a['step'], a['changes'])}" for a in p.get("amendments", ())),
        f"  momentum       fills in {p['accumulator_warmin_epochs']:.3g} epochs",
        "",
        "  stage     steps               epoch       kn         lr  momentum  noise scale",
    ]
    for i, s in enumerate(p["stages"]):
        lines.append(
            f"  {i:5d}  {s['first_step']:8d} - {s['last_step']:<8d} {s['first_epoch']:6d} {s['global_batch']:8d} "
            f"{s['lr']:10.6g} {s['momentum']:9g} {s['noise_scale']:12.1f}"
        )
    if not p["here"]:
        lines += ["", "  as a job (compute only)"]
        lines += ["  nodes  ranks       kn         lr   warm-up      steps      hours  node-hours"]
    for j in () if p["here"] else p["jobs"]:
        start = f"  {j['nodes']:5d} {j['ranks']:6d}"
        lines.append(
            f"{start}  {j['problem']}"
            if "problem" in j
            else f"{start} {j['global_batch']:8d} {j['peak_lr']:10.6g} {j['warmup_steps']:9d} {j['steps']:10d} "
            f"{j['hours']:10.2f} {j['node_hours']:11.1f}"
            + (f"  ({j['idle_ranks']} ranks without work)" if j["idle_ranks"] else "")
        )
    if "batches" in p:
        lines += ["", f"  to the same loss, by batch (critical batch {p['critical_batch']:.0f}; compute only)"]
        lines += ["        kn  nodes      steps     examples  x fewest      hours  node-hours"]
        for b in p["batches"]:
            mark = "  <- recommended" if b["global_batch"] == p["recommended_batch"] else ""
            lines.append(
                f"  {b['global_batch']:8d} {b['nodes']:6d} {b['steps']:10d} {b['examples']:12d} "
                f"{b['examples_over_fewest']:9.2f} {told(b['hours'], 10, 2)} {told(b['node_hours'], 11, 1)}{mark}"
            )
    if "table" in p:
        lines += ["", "    step  epoch          lr  momentum       kn"]
        lines += [
            f"{r['step']:8d} {r['epoch']:6d} {r['lr']:11.8g} {r['momentum']:9g} {r['global_batch']:8d}"
            for r in p["table"]
        ]
    return "\n".join(lines)
