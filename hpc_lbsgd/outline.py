"""A run's numbers, from its recipe alone: printed at every start, and what `plan` builds on."""

from __future__ import annotations

from hpc_lbsgd.data.order import passes_of_rank
from hpc_lbsgd.theory.scaling import accumulator_warmin_epochs, noise_scale, noise_scale_exact
from hpc_lbsgd.theory.schedule import Schedule


def outline(recipe, schedule: Schedule, ranks: int) -> dict:
    """The plan of a run on `ranks` ranks; keys as in DESIGN.md, "Command line". `batch.workers` must be settled."""
    workers, n = recipe.batch.workers, recipe.batch.samples_per_worker
    first = schedule.stages[0]
    kn = first.workers * n
    stages = []
    for i, stage in enumerate(schedule.stages):
        end_epoch = schedule.stages[i + 1].first_epoch if i + 1 < len(schedule.stages) else schedule.epochs
        batch = stage.workers * n
        noise = (stage.lr, stage.momentum, batch, schedule.samples)
        stages.append(
            {
                "first_step": schedule.first_step(stage.first_epoch),
                "last_step": schedule.first_step(stage.first_epoch)
                + (end_epoch - stage.first_epoch) * schedule.steps_in_epoch(stage.first_epoch)
                - 1,
                "first_epoch": stage.first_epoch,
                "global_batch": batch,
                "workers": stage.workers,
                "lr": stage.lr,
                "momentum": stage.momentum,
                "shape": stage.shape,
                "noise_scale": noise_scale(*noise),
                "noise_scale_exact": noise_scale_exact(*noise),
            }
        )
    return {
        "global_batch": kn,
        "workers": workers,
        "samples_per_worker": n,
        "bn_group": recipe.batch.group,
        "ranks": ranks,
        "idle_ranks": max(0, ranks - max(s.workers for s in schedule.stages)),
        "passes_per_step": len(passes_of_rank(workers, 0, ranks, recipe.machine.workers_per_pass)),
        "peak_lr": first.lr,
        "warmup_start_lr": min(schedule.warmup.start_lr, first.lr),
        "warmup_epochs": schedule.warmup.epochs,
        "warmup_steps": schedule.warmup_steps,
        "samples": schedule.samples,
        "epochs": schedule.epochs,
        "steps": schedule.steps,
        "steps_per_epoch": schedule.steps_in_epoch(0),
        "accumulator_warmin_epochs": accumulator_warmin_epochs(kn, schedule.samples, first.momentum),
        "stages": stages,
    }


def render(name: str, o: dict, recipe) -> str:
    """The block that a run starts with."""
    each = f"{o['passes_per_step']} pass{'es' if o['passes_per_step'] > 1 else ''} a step each"
    if o["idle_ranks"]:
        each += f", {o['idle_ranks']} ranks without work"
    if o["warmup_steps"]:
        lr = (
            f"{o['warmup_start_lr']:g} -> {o['peak_lr']:g} over {o['warmup_steps']} steps "
            f"({o['warmup_epochs']:g} epochs), then {recipe.schedule.kind}"
        )
    else:
        lr = f"{o['peak_lr']:g}, {recipe.schedule.kind}"
    capped = f", capped at {o['steps']}" if recipe.train.max_steps else ""
    return "\n".join(
        [
            f"{name}: kn = {o['global_batch']} (k = {o['workers']} workers of n = {o['samples_per_worker']}, "
            f"BatchNorm over {o['bn_group']})",
            f"  ranks          {o['ranks']}, {each}",
            f"  learning rate  {lr}",
            f"  steps          {o['steps_per_epoch']} an epoch, {o['epochs']} epochs{capped}; "
            f"N = {o['samples']}, last batch: {recipe.batch.last_batch}",
            f"  precision      {recipe.precision}, determinism {recipe.determinism}",
        ]
    )
