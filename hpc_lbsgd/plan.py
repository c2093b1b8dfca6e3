"""The run before it runs: what a recipe means on so many nodes, and what it asks of their network."""

from __future__ import annotations

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.order import Permutation, worker_samples
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.outline import outline, render
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.theory.scaling import required_gbit_per_s

# Sustained bf16 training rate that stands in for a measured images/s: one A100 at 2470 ResNet-50 images/s
# (NVIDIA DeepLearningExamples, mixed precision), 3 * 8.2 GFLOP an image.
ASSUMED_TFLOPS = 60.8
BACKWARD_SHARE = 2 / 3  # backward costs about twice what forward does


def model_costs(recipe: Recipe, classes: int) -> tuple[int, float]:
    """(parameters, forward + backward FLOP an image), counted on a model without storage."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from hpc_lbsgd.train import models

    with torch.device("meta"):
        model = models.build(recipe.model, recipe.data.channels, classes, recipe.seed)
        images = torch.empty(2, recipe.data.channels, recipe.data.image_size, recipe.data.image_size)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / len(images)


def samples_and_classes(recipe: Recipe) -> tuple[int, int]:
    """N and the number of classes: from the data where it is there, else from the recipe."""
    data = recipe.data
    try:
        found = manifests.Manifest(manifests.find(data.train)) if data.train else None
    except RequestError:
        found = None
    samples, classes = data.samples or (found and len(found)), data.classes or (found and len(found.classes))
    if not samples:
        raise RequestError("data.samples is not set, and data.train has no manifest to count: set data.samples=N")
    if found and len(found) != samples:
        raise RequestError(f"data.samples = {samples}, but {data.train} has {len(found)}")
    return samples, classes or 1000


def plan(
    recipe: Recipe,
    nodes: int,
    gpus_per_node: int,
    images_per_s: float | None = None,
    steps: tuple[int, int] | None = None,
) -> dict:
    """Everything `plan` reports.

    images_per_s: a rank's training rate without communication, measured; else assumed from the model's FLOP.
    steps: (a, b) adds a table of steps a..b-1.
    """
    ranks = nodes * gpus_per_node
    settled = recipe.with_workers(ranks)
    samples, classes = samples_and_classes(settled)
    schedule = settled.build_schedule(samples)
    result = {"nodes": nodes, "gpus_per_node": gpus_per_node, **outline(settled, schedule, ranks)}
    parameters, flop = model_costs(settled, classes)
    assumed = images_per_s is None
    rate = images_per_s or ASSUMED_TFLOPS * 1e12 / flop
    # the last pass of a step is the one whose backward can hide the sum
    last_pass = settled.batch.samples_per_worker * settled.machine.workers_per_pass
    gradient_bytes = parameters * {"fp32": 4, "fp16": 2}[settled.wire]
    if settled.precision == "float64" or settled.determinism == "any-ranks":
        gradient_bytes = parameters * 8
    result |= {
        "parameters": parameters,
        "gradient_bytes": gradient_bytes,
        "flop_per_image": flop,
        "images_per_s_per_rank": rate,
        "images_per_s_assumed": assumed,
        "required_gbit_per_s": required_gbit_per_s(gradient_bytes, BACKWARD_SHARE * last_pass / rate),
    }
    if steps:
        first, last = steps
        if not 0 <= first < last <= schedule.full_steps:
            raise RequestError(
                f"--steps {first}:{last}: the run has steps 0 to {schedule.full_steps - 1}; give A:B with "
                f"0 <= A < B <= {schedule.full_steps}"
            )
        points = (schedule.at(s) for s in range(first, last))
        result["table"] = [
            {"step": p.step, "epoch": p.epoch, "lr": p.lr, "momentum": p.momentum, "global_batch": p.global_batch}
            for p in points
        ]
    return result


def show(name: str, recipe: Recipe, p: dict) -> str:
    """`plan` for a person."""
    lines = [render(name, p, recipe.with_workers(p["ranks"]))]
    kind = "assumed" if p["images_per_s_assumed"] else "given"
    lines += [
        f"  nodes          {p['nodes']} of {p['gpus_per_node']} GPUs",
        f"  gradients      {p['parameters'] / 1e6:.1f} M parameters, {p['gradient_bytes'] / 1e6:.1f} MB a step; to "
        f"hide behind backward at {p['images_per_s_per_rank']:.0f} images/s a rank ({kind}): "
        f"{p['required_gbit_per_s']:.1f} Gbit/s a rank",
        f"  momentum       fills in {p['accumulator_warmin_epochs']:.3g} epochs",
        "",
        "  stage     steps               epoch       kn         lr  momentum  noise scale",
    ]
    for i, s in enumerate(p["stages"]):
        lines.append(
            f"  {i:5d}  {s['first_step']:8d} - {s['last_step']:<8d} {s['first_epoch']:6d} {s['global_batch']:8d} "
            f"{s['lr']:10.6g} {s['momentum']:9g} {s['noise_scale']:12.1f}"
        )
    if "table" in p:
        lines += ["", "    step  epoch          lr  momentum       kn"]
        lines += [
            f"{r['step']:8d} {r['epoch']:6d} {r['lr']:11.8g} {r['momentum']:9g} {r['global_batch']:8d}"
            for r in p["table"]
        ]
    return "\n".join(lines)


def order(
    name: str | None,
    settings: list[str],
    samples: int | None,
    workers: int | None,
    samples_per_worker: int | None,
    seed: int | None,
    last_batch: str | None,
    epoch: int,
    worker: int,
) -> dict:
    """Worker j's samples of an epoch: `samples` in order, `steps` the same a list a step.

    From a recipe, or from numbers alone; numbers beside a recipe change it.
    """
    overrides = {
        "batch.workers": workers,
        "batch.samples_per_worker": samples_per_worker,
        "seed": seed,
        "batch.last_batch": last_batch,
        "data.samples": samples,
    }
    changed = [*settings, *(f"{k}={v}" for k, v in overrides.items() if v is not None)]
    if name:
        recipe = recipes.read(name, changed)
    else:
        if samples is None or workers is None:
            raise RequestError("data order: give a recipe, or --samples N and --workers K")
        content: dict = {}
        for setting in changed:
            recipes.override(content, setting)
        recipe = recipes.validate(content, "data order")
    if recipe.batch.workers == "per_rank":
        raise RequestError("batch.workers = per_rank: say for how many with --workers K")
    if worker >= recipe.batch.workers:
        raise RequestError(
            f"--worker {worker}: there are {recipe.batch.workers} workers, 0 to {recipe.batch.workers - 1}"
        )
    if epoch >= recipe.train.epochs:
        raise RequestError(f"--epoch {epoch}: the run has epochs 0 to {recipe.train.epochs - 1}")
    n_samples = samples_and_classes(recipe)[0]
    schedule = recipe.build_schedule(n_samples)
    permutation = Permutation(n_samples, recipe.seed, epoch)
    first = schedule.first_step(epoch)
    steps = [
        worker_samples(permutation, schedule.at(first + i), worker).tolist()
        for i in range(schedule.steps_in_epoch(epoch))
    ]
    return {
        "epoch": epoch,
        "worker": worker,
        "workers": recipe.batch.workers,
        "samples_total": n_samples,
        "samples": [s for step in steps for s in step],
        "steps": steps,
    }
