"""A run's numbers, from its recipe alone: printed at every start, and what `plan` builds on."""

from __future__ import annotations

from hpc_lbsgd.data.order import passes_of_rank
from hpc_lbsgd.theory.scaling import accumulator_warmin_epochs, noise_scale, noise_scale_exact
from hpc_lbsgd.theory.schedule import Schedule

GOYALS_LIMIT = 8192  # Goyal et al. 2017, figure 1: above it accuracy falls on ImageNet

# Malladi et al. 2022 (on the SDEs and scaling rules of adaptive gradient algorithms) show it for Adam and RMSprop
ADAPTIVE = ("adam", "adamw", "adamax", "nadam", "radam", "rmsprop")

FAR = 32  # 8192 of 256, figure 1: as far as linear scaling was shown to hold


def warnings(recipe, schedule: Schedule, critical_batch: float | None = None) -> list[str]:
    """What the papers would say against this run. Never an error: people may know better."""
    found = []
    n = schedule.samples_per_worker
    start, largest = (n * k for k in (schedule.stages[0].workers, max(s.workers for s in schedule.stages)))
    if start > GOYALS_LIMIT and recipe.optim.name != "lars":
        found.append(
            f"the run starts at kn = {start}, above {GOYALS_LIMIT}, where linear scaling broke on ImageNet "
            "(Goyal et al. 2017); optim.name = lars is made for it"
        )
    if largest > schedule.samples / 10:
        found.append(
            f"kn = {largest} is more than N/10 = {schedule.samples / 10:.0f}, where noise scale and batch part "
            "company (Smith et al. 2018)"
        )
    if largest > schedule.samples:
        found.append(
            f"kn = {largest} is more than N = {schedule.samples}: an epoch is one tail, whose gradient is its sum over "
            f"kn, as if the learning rate were {schedule.samples / largest:.3g} of what it is"
        )
    reached = [s for s in schedule.stages if s.first_epoch < schedule.epochs]
    if len(reached) == 1 and reached[0].shape == "constant" and recipe.schedule.kind != "adaptive-batch":
        found.append(
            "the learning rate never falls and the batch never grows: most of the accuracy comes when they do "
            "(schedule.milestones, or schedule.kind = cosine)"
        )
    far = start / recipe.optim.base_batch
    if recipe.schedule.scaling != "none" and not 1 / FAR <= far <= FAR:
        found.append(
            f"the run starts at kn = {start}, {far:.3g} times optim.base_batch = {recipe.optim.base_batch}: scaling "
            f"was not tried that far (Goyal et al. 2017: up to {FAR} times); find base_lr at a nearer base_batch"
        )
    if recipe.optim.name in ADAPTIVE and recipe.schedule.scaling == "linear" and far != 1:
        found.append(
            f"optim.name = {recipe.optim.name} with schedule.scaling = linear, at {far:.3g} times optim.base_batch: "
            "adaptive rates follow the square root of the batch (Malladi et al. 2022); schedule.scaling = sqrt"
        )
    if largest == n and recipe.train.noise_scale_steps:
        found.append("k = 1: the noise scale is not measured (train.noise_scale_steps), it takes two workers")
    if critical_batch and largest > critical_batch:
        found.append(
            f"kn = {largest} is above the critical batch {critical_batch:.0f}: more than twice the fewest examples "
            "(McCandlish et al. 2018)"
        )
    for stage in schedule.stages:
        kn = stage.workers * schedule.samples_per_worker
        epochs = accumulator_warmin_epochs(kn, schedule.samples, stage.momentum)
        if epochs > 1:
            found.append(
                f"momentum {stage.momentum} at kn = {kn} fills its buffer in {epochs:.1f} epochs, more than one "
                "(Smith et al. 2018)"
            )
            break
    return found


def outline(recipe, schedule: Schedule, ranks: int, critical_batch: float | None = None) -> dict:
    """The plan of a run on `ranks` ranks. `batch.workers` must be settled."""
    workers, n = recipe.batch.k, recipe.batch.samples_per_worker
    first = schedule.stages[0]
    kn = first.workers * n
    stages = []
    for stage, start, stop in schedule.spans():
        batch = stage.workers * n
        noise = (stage.lr, stage.momentum, batch, schedule.samples)
        stages.append(
            {
                "first_step": start,
                "last_step": stop - 1,
                "first_epoch": schedule.at(start).epoch,
                "global_batch": batch,
                "workers": stage.workers,
                "lr": stage.lr,
                "momentum": stage.momentum,
                "shape": stage.shape if isinstance(stage.shape, str) else recipe.schedule.kind,
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
        "warnings": warnings(recipe, schedule, critical_batch),
    }


def render(name: str, o: dict, recipe) -> str:
    """The block that a run starts with."""
    each = f"{o['passes_per_step']} pass{'es' if o['passes_per_step'] > 1 else ''} a step each"
    if o["idle_ranks"]:
        each += f", {o['idle_ranks']} ranks without work"
    lr = f"{o['peak_lr']:g}, {recipe.schedule.kind}"
    if o["warmup_steps"]:
        how = "over" if recipe.schedule.warmup == "gradual" else "constant for"
        lr = (
            f"{o['warmup_start_lr']:g} -> {o['peak_lr']:g}, {how} {o['warmup_steps']} steps "
            f"({o['warmup_epochs']:g} epochs), then {recipe.schedule.kind}"
        )
    batches = list(dict.fromkeys(s["global_batch"] for s in o["stages"]))
    grows = f", growing to {', '.join(map(str, batches[1:]))}" if len(batches) > 1 else ""
    if grows:
        steps = f"{o['stages'][-1]['last_step'] + 1} in {o['epochs']} epochs"
    else:
        steps = f"{o['steps_per_epoch']} an epoch, {o['epochs']} epochs"
    capped = f", capped at {o['steps']}" if recipe.train.max_steps else ""
    return "\n".join(
        [
            f"{name}: kn = {o['global_batch']}{grows} (k = {o['workers']} workers of n = {o['samples_per_worker']}, "
            f"BatchNorm over {o['bn_group']})",
            f"  ranks          {o['ranks']}, {each}",
            f"  learning rate  {lr}",
            f"  steps          {steps}{capped}; N = {o['samples']}, last batch: {recipe.batch.last_batch}",
            f"  precision      {recipe.precision}, determinism {recipe.determinism}",
            *(f"  warning        {w}" for w in o["warnings"]),
        ]
    )
