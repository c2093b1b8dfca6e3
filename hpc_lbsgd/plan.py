"""The run before it runs: what a recipe means on so many nodes, and what it asks of their network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from hpc_lbsgd import here as machines
from hpc_lbsgd.amend import Amendment, checked, recipe_now, schedule_of
from hpc_lbsgd.bench.simulate import workload
from hpc_lbsgd.data.order import passes_of_rank
from hpc_lbsgd.data.who import samples_and_classes, set_of
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.outline import outline
from hpc_lbsgd.recipe import Decision, Recipe, load_resolved
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.sections import OPTIMIZERS
from hpc_lbsgd.theory.scaling import required_gbit_per_s
from hpc_lbsgd.theory.schedule import Schedule
from hpc_lbsgd.theory.tradeoff import Tradeoff

# Sustained bf16 training rate that stands in for a measured images/s: one A100 at 2470 ResNet-50 images/s
# (NVIDIA DeepLearningExamples, mixed precision), 3 * 8.2 GFLOP an image.
ASSUMED_TFLOPS = 60.8
BACKWARD_SHARE = 2 / 3  # backward costs about twice what forward does
JOB_NODES = (1, 2, 4, 8, 16, 32)
GPUS_PER_NODE = 8  # of a machine elsewhere, unless said


def model_costs(recipe: Recipe, classes: int) -> tuple[int, float]:
    """(parameters, forward + backward FLOP an image): of stored layers, else counted on a model without storage."""
    if layers := workload.known(recipe, classes):
        # backward multiplies twice as often, but for the first layer, whose inputs need no gradient
        flop = 3 * sum(layer.flop for layer in layers) - layers[0].flop
        return sum(layer.parameters for layer in layers), float(flop)
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from hpc_lbsgd.data.targets import each_tensor
    from hpc_lbsgd.train import models
    from hpc_lbsgd.train.preflight import shapes
    from hpc_lbsgd.train.probe import tensors
    from hpc_lbsgd.train.replica import called

    def counted(model: torch.nn.Module, device: str) -> float:
        inputs = each_tensor(lambda t: t.to(device), samples)
        with FlopCounterMode(display=False) as counter:
            sum(t.sum() for t in tensors(called(model, inputs)) if t.requires_grad).backward()
        return counter.get_total_flops() / 2

    samples = two_samples(recipe)
    try:
        model = models.without_storage(recipe, classes)
        flop = counted(model, "meta")
    except Exception:  # a model that anyone may have written, whose forward looks at values
        model = models.build(recipe.model, recipe.data.channels, classes, recipe.seed, fresh=True)
        try:
            flop = counted(model, "cpu")
        except Exception as problem:
            raise RequestError(
                f"model.name = {recipe.model.name}: it cannot be run on 2 samples, {shapes(samples)} "
                f"({type(problem).__name__}: {problem})"
            ) from None
    return sum(p.numel() for p in model.parameters()), flop


def two_samples(recipe: Recipe):
    """What the model gets of two samples: zeros where they are pictures alone, else what the first sample is."""
    import numpy as np
    import torch

    from hpc_lbsgd.data import loader, user
    from hpc_lbsgd.data.storage import Request
    from hpc_lbsgd.data.targets import each
    from hpc_lbsgd.train.replica import measured

    data, asked = recipe.data, Request(0, np.zeros(2, np.int64))
    if data.dataset:
        batch = user.collected(user.UserSet(data.dataset, "train"), recipe.seed, asked)
    else:
        found = set_of(data)
        if data.inputs == ["image"] and not (found and found.own):
            return torch.zeros(2, data.channels, data.image_size, data.image_size)
        if found is None:
            raise RequestError(f"data.inputs = [{', '.join(data.inputs)}]: what they are the data says; set data.train")
        section = data.model_copy(update={"loader": "torchvision"})
        made = loader.create(section, found, recipe.seed, True, 2, 1, 1, False, torch.device("cpu"))
        (batch,) = made.batches([asked])
    return each(lambda given: measured(given, torch.float32), batch.inputs)


def plan(
    recipe: Recipe,
    nodes: int | None,
    gpus_per_node: int | None,
    images_per_s: float | None = None,
    steps: tuple[int, int] | None = None,
    critical_batch: float | None = None,
    system: str | None = None,
    decisions: Sequence[Decision] = (),
    amendments: Sequence[Amendment] = (),
    run: RunFolder | None = None,
) -> dict:
    """Everything `plan` reports. decisions, amendments, run: of a run that has begun (`of_run`).

    nodes, gpus_per_node: where neither is said, nor a system, the plan is of this machine.
    images_per_s: a rank's training rate without communication, measured; else, here, that of a run on record, and on
    GPUs assumed from the model's FLOP.
    steps: (a, b) adds a table of steps a..b-1. critical_batch: B_crit (or B_simple, its predictor) adds a table of
    batches with a recommendation. system: a preset of `bench simulate`, whose cluster the run is predicted on.
    """
    if recipe.optim.name not in OPTIMIZERS:
        from hpc_lbsgd.train import own_optim  # with torch

        own_optim.check(recipe.optim)
    here = None if nodes or gpus_per_node or system else machines.at_hand()
    nodes, gpus_per_node = nodes or 1, gpus_per_node or (here.ranks if here else GPUS_PER_NODE)
    ranks = nodes * gpus_per_node
    settled = recipe.with_workers(ranks)
    samples, classes = samples_and_classes(settled)
    schedule = schedule_of(settled, samples, decisions, amendments)
    settled = recipe_now(settled, amendments, schedule.full_steps)
    found = machines.on_record(settled, here, [run.path] if run else []) if here and not images_per_s else None
    rate = images_per_s or (found[1] if found else None)
    result = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "here": here.device if here else None,
        **outline(settled, schedule, ranks, critical_batch),
        **demands(settled, classes, rate, assumed=not here or here.device == "cuda"),
        "images_per_s_of": found[0] if found else None,
    }
    rate, shown = result["images_per_s_per_rank"], JOB_NODES[:1] if here else JOB_NODES
    if amendments:
        result["amendments"] = [{"step": step, "changes": changes} for step, changes in amendments]
    result["jobs"] = jobs(recipe, samples, gpus_per_node, rate, decisions, amendments, shown)
    if system:
        result["predicted"] = predicted(settled, classes, system, nodes, gpus_per_node, result)
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
    if critical_batch:
        result["critical_batch"] = critical_batch
        smallest = recipe.batch.samples_per_worker * (1 if here else gpus_per_node)
        result["batches"] = batches(settled, samples, smallest, gpus_per_node, rate, critical_batch)
        # the knee: above it each saved step costs more examples than it did below
        within = [b["global_batch"] for b in result["batches"] if b["global_batch"] <= critical_batch]
        result["recommended_batch"] = max(within, default=result["batches"][0]["global_batch"])
    return result


def of_run(folder: RunFolder) -> tuple[Recipe, list[Decision], list[Amendment]]:
    """A run's recipe, and what was decided and amended since it began."""
    decided = (r for r in read_metrics(folder.metrics) if r.get("event") == "decision")
    decisions = [Decision(*(r[key] for key in Decision._fields)) for r in decided]
    return load_resolved(folder.recipe), decisions, checked(folder.read_amendments(), str(folder.amendments))


def jobs(
    recipe: Recipe,
    samples: int,
    gpus_per_node: int,
    rate: float | None,
    decisions: Sequence[Decision] = (),
    amendments: Sequence[Amendment] = (),
    job_nodes: Sequence[int] = JOB_NODES,
) -> list[dict]:
    """The same recipe as a job of 1 to 32 nodes: kn, learning rate, steps, time, node-hours.

    With `workers: per_rank` kn follows from the nodes, with a fixed k it stays. Compute only, at `rate` images/s a
    rank, of which nothing may be known: communication is not in it. A number of nodes that the recipe cannot have has a
    `problem` instead.
    decisions, amendments: of a run that has begun.
    """
    rows = []
    for nodes in job_nodes:
        ranks = nodes * gpus_per_node
        settled = recipe.with_workers(ranks)
        try:
            schedule = schedule_of(settled, samples, decisions, amendments)
        except RequestError as problem:
            rows.append({"nodes": nodes, "ranks": ranks, "problem": str(problem)})
            continue
        facts = outline(settled, schedule, ranks)
        hours = rate and compute_hours(schedule, ranks, rate)
        kept = ("global_batch", "peak_lr", "warmup_steps", "steps", "idle_ranks")
        spent = {"hours": hours, "node_hours": hours and hours * nodes}
        rows.append({"nodes": nodes, "ranks": ranks, **{k: facts[k] for k in kept}, **spent})
    return rows


def compute_hours(schedule: Schedule, ranks: int, rate: float) -> float:
    """Time of all steps, each as long as its busiest rank computes."""
    seconds = 0.0
    for stage, start, stop in schedule.spans():
        busiest = len(passes_of_rank(stage.workers, 0, ranks, 1))  # workers of rank 0, which never has fewer
        images = busiest * schedule.samples_per_worker
        seconds += max(0, min(stop, schedule.steps) - start) * images / rate
    return seconds / 3600


def measured_noise_scale(run: str) -> float:
    """B_simple as a run measured it last."""
    found = [r["noise_scale"] for r in read_metrics(RunFolder(run).metrics) if r.get("noise_scale")]
    if not found:
        raise RequestError(f"--noise-from {run}: no noise scale in it (train.noise_scale_steps)")
    return found[-1]


def demands(recipe: Recipe, classes: int, images_per_s: float | None, assumed: bool) -> dict:
    """What a step computes and sends, and the bandwidth that hides it. assumed: a rate that is not known is a GPU's."""
    parameters, flop = model_costs(recipe, classes)
    rate = images_per_s or (ASSUMED_TFLOPS * 1e12 / flop if assumed else None)
    # the last pass of a step is the one whose backward can hide the sum
    last_pass = recipe.batch.samples_per_worker * recipe.machine.workers_per_pass
    item_bytes = {"fp32": 4, "fp16": 2, "bf16": 2}[recipe.wire]
    if recipe.precision == "float64" or (recipe.determinism == "any-ranks" and recipe.fixed_point == "int64"):
        item_bytes = 8
    gradient_bytes = parameters * item_bytes
    return {
        "parameters": parameters,
        "gradient_bytes": gradient_bytes,
        "flop_per_image": flop,
        "images_per_s_per_rank": rate,
        "images_per_s_assumed": rate is not None and images_per_s is None,
        "required_gbit_per_s": rate and required_gbit_per_s(gradient_bytes, BACKWARD_SHARE * last_pass / rate),
    }


def predicted(recipe: Recipe, classes: int, preset: str, nodes: int, gpus_per_node: int, known: dict) -> dict:
    """The busiest rank's step on a preset's cluster, simulated; efficiency is against one node that does the same work
    a rank. Only the last pass's backward can hide the sum, so all before it counts as forward."""
    from hpc_lbsgd.bench.simulate import run as bench
    from hpc_lbsgd.theory import simulate

    chosen = bench.choose(preset, ranks_per_node=gpus_per_node, bucket_mb=recipe.machine.bucket_mb).system
    method = replace(chosen.method, item_bytes=known["gradient_bytes"] // known["parameters"])
    samples = min(known["passes_per_step"] * recipe.machine.workers_per_pass, recipe.batch.workers)
    samples *= recipe.batch.samples_per_worker
    last_pass = min(samples, recipe.machine.workers_per_pass * recipe.batch.samples_per_worker)
    rate = known["images_per_s_per_rank"]
    backward_s = BACKWARD_SHARE * last_pass / rate
    layers = workload.layers(recipe, classes)
    work = simulate.Workload(layers, samples, samples / rate - backward_s, backward_s)
    run = replace(chosen, workload=work, method=method)
    outcome = simulate.step(run, nodes)
    knee = simulate.knee(run, gpus_per_node)
    return {
        "system": preset,
        "step_s": outcome.step_s,
        "exposed_comm_s": outcome.exposed_comm_s,
        "straggler_s": outcome.straggler_s,
        "images_per_s": known["global_batch"] / outcome.step_s,
        "efficiency": simulate.efficiency(run, nodes, gpus_per_node),
        "efficiency_baseline": "one node, the same work a rank",
        "knee_nodes": knee[0] if knee else None,
        "knee_set_by": knee[1] if knee else None,
    }


def batches(
    recipe: Recipe, samples: int, smallest: int, gpus_per_node: int, rate: float | None, critical_batch: float
) -> list[dict]:
    """Steps, examples, time and node-hours against the batch, one worker a rank (McCandlish et al. 2018, eq. 2.11).

    The recipe's epochs are taken to be right at optim.base_batch; the frontier says what other batches need for the
    same loss. Compute only: communication is not in it.
    """
    n, reference = recipe.batch.samples_per_worker, recipe.optim.base_batch
    examples = recipe.train.epochs * samples
    min_examples = examples / (1 + reference / critical_batch)
    frontier = Tradeoff(min_examples / critical_batch, min_examples)
    rows = []
    batch = smallest
    while not rows or batch <= min(64 * critical_batch, samples):
        needed, ranks = frontier.examples(batch), batch // n
        hours = rate and needed / (rate * ranks) / 3600
        nodes = math.ceil(ranks / gpus_per_node)
        rows.append(
            {
                "global_batch": batch,
                "ranks": ranks,
                "nodes": nodes,
                "steps": round(frontier.steps(batch)),
                "examples": round(needed),
                "examples_over_fewest": needed / min_examples,
                "hours": hours,
                "node_hours": hours and hours * nodes,
            }
        )
        batch *= 2
    return rows
