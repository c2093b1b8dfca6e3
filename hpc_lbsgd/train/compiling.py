"""machine.compile: which parts of a model torch's compiler makes, and where it makes none."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel.compiler import why_not
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.train import ghost, models
from hpc_lbsgd.train.workers import PassContext, VirtualLayer, VirtualNorm


def settle(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with `machine.compile: auto` as what this device and model do; a GPU that does without says why.
    Rank 0 only: the answer is every rank's."""
    if recipe.machine.compile != "auto":
        return recipe
    chosen = "none"
    if device.type == "cuda":
        if problem := why_not(device):
            warnings.warn(
                f"machine.compile = auto: nothing is compiled here ({problem}): passes launch each operation by "
                "itself, which a small batch waits for. A C compiler on the nodes mends it, most often",
                stacklevel=2,
            )
        else:
            chosen = "stages" if has_stages(recipe) else "norms"
    return recipe.with_compile(chosen)


def has_stages(recipe: Recipe) -> bool:
    try:
        return bool(stages_of(models.without_storage(recipe, recipe.data.classes)))
    except RequestError:
        raise
    except Exception:  # a model that anyone may have written, which looks at values while it is made
        return False


def stages_of(model: nn.Module) -> list[nn.Module]:
    """A residual network's stages, by their names in torchvision, in timm and here; [] where it has none."""
    own = getattr(model, "stages", None)
    named = list(own) if isinstance(own, nn.Sequential | nn.ModuleList | list) else []
    named = named or [getattr(model, f"layer{i}", None) for i in (1, 2, 3, 4)]
    return named if all(isinstance(stage, nn.Module) for stage in named) else []


def compile_parts(model: nn.Module, context: PassContext, how: str, samples_per_worker: int) -> None:
    """torch.compile what `how` says:

    stages   each residual stage, and `norms` outside of them: one compiled whole would delay every gradient to
             backward's end, and communication could not overlap it
    norms    torch's BatchNorms alone, where a pass holds several groups: each layer's groups at once

    For passes of whole workers, `samples_per_worker` each: a graph for each number of workers in a pass, which
    `any-ranks` has one of. A tail, and evaluation, run as their author wrote them. Never a graph for many shapes: which
    shapes a process has met, and so where it was resumed, must not decide which kernels run.
    """
    stages = stages_of(model) if how == "stages" else []
    if how == "stages" and not stages:
        raise RequestError(
            f"machine.compile = stages: {type(model).__name__} has neither `stages` nor layer1 to layer4; "
            "allowed: auto, norms, none"
        )
    import torch._dynamo  # a second, for nothing where nothing is compiled

    # Parts of one class share their code, and so one list of graphs: parts x numbers of workers x modes
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    context.samples_per_worker = samples_per_worker
    alone = _compiled(ghost.batch_norm, f"machine.compile = {how}: a BatchNorm's groups")

    def traced(*args):
        """A stage that is walked block by block is compiled nowhere; its norms are, each by itself."""
        return (ghost.batch_norm if torch.compiler.is_compiling() else alone)(*args)

    inside = {module for stage in stages for module in stage.modules()}
    for layer in context.layers:
        if isinstance(layer, VirtualNorm):
            layer.keep_out_of_graphs()
            if layer.plain:
                layer.at_once = traced if layer.module in inside else alone
    for stage in stages:
        mine = set(stage.modules())
        stage.forward = _for_whole_workers(stage, context, [layer for layer in context.layers if layer.module in mine])


def _for_whole_workers(stage: nn.Module, context: PassContext, virtual: list[VirtualLayer]) -> Callable:
    own, compiled = stage.forward, _compiled(stage.forward, "machine.compile = stages: a stage")

    def forward(*args, **kwargs):
        if not context.whole:
            return own(*args, **kwargs)
        if virtual:  # compiled code counts the calls of its layers, but cannot ask whether backward repeats one
            context.settle(virtual)
        return compiled(*args, **kwargs)

    return forward


def _compiled(function: Callable, what: str) -> Callable:
    made = torch.compile(function, dynamic=False, fullgraph=False)

    def call(*args, **kwargs):
        try:
            return made(*args, **kwargs)
        except (torch._dynamo.exc.BackendCompilerFailed, torch._dynamo.exc.TorchRuntimeError) as problem:
            told = " ".join(str(problem).split())[:300]
            raise RunError(f"{what} cannot be compiled ({told}); machine.compile = none trains without") from problem

    return call
