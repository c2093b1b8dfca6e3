"""What can be distributed, and that all ranks ask for the same."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from hpc_lbsgd.api.shuffle import GlobalShuffle
from hpc_lbsgd.api.world import World
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.engine import Engine
from hpc_lbsgd.theory.schedule import Schedule
from hpc_lbsgd.train.alike import refuse_other
from hpc_lbsgd.train.own_optim import refuse_closure, refuse_sparse
from hpc_lbsgd.train.refusals import refuse_shared_memory

DISTRIBUTED = "_hpc_lbsgd_distributed"  # an attribute of parameters that are in buckets
POINTS = 64  # of a schedule, that are compared


def refuse_unfit(model: nn.Module, optimizer: torch.optim.Optimizer, norm_calls: Mapping[str, int] | None) -> None:
    """Raise RequestError, with the name, for what cannot be distributed."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RequestError(f"lb.distribute: {type(optimizer).__name__} is no torch.optim.Optimizer; give what it wraps")
    if not getattr(type(optimizer).step, "hooked", False):  # by torch.optim.Optimizer's own __init__
        raise RequestError(
            f"lb.distribute: {type(optimizer).__name__} steps beside torch's hooks, by which a step is checked and "
            "BatchNorm's statistics are moved (it did not call torch.optim.Optimizer.__init__); give what it wraps"
        )
    refuse_closure(optimizer, f"lb.distribute: {type(optimizer).__name__}")
    refuse_sparse(optimizer, f"lb.distribute: {type(optimizer).__name__}")
    wrapped = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrapped) or any("DistributedOptimizer" in c.__name__ for c in type(optimizer).__mro__):
        raise RequestError("lb.distribute: takes the bare model and optimizer; it sums gradients itself")
    if "zero_grad" in vars(optimizer):
        raise RequestError("lb.distribute: this optimizer was distributed already; make a new one, and a new model")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise RequestError("lb.distribute: the model has no parameter that trains")
    if again := next((name for name, p in named.items() if hasattr(p, DISTRIBUTED)), None):
        raise RequestError(
            f"lb.distribute: {again} is in another run already, which would sum it too; make the model anew, and "
            "load_state_dict or lb.load what it is to go on from"
        )
    if empty := next((name for name, t in (*named.items(), *model.named_buffers()) if t.is_meta), None):
        raise RequestError(
            f"lb.distribute: {empty} is on the meta device, without values: model.to_empty(device=world.device), then "
            "give all of it values"
        )
    types = {p.dtype for p in named.values()}
    if len(types) > 1 or not types <= {torch.float32, torch.float64}:
        raise RequestError(
            f"lb.distribute: parameters of {', '.join(sorted(map(str, types)))}: all float32, or all float64; forward "
            "may compute in bfloat16 (torch.autocast)"
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missed := [name for name, p in named.items() if id(p) not in stepped]:
        raise RequestError(
            f"lb.distribute: {missed[0]} is in none of the optimizer's groups, and no step would move it: add it, or "
            "set requires_grad to False"
        )
    if stepped - {id(p) for p in model.parameters()}:
        raise RequestError(
            "lb.distribute: the optimizer has parameters that are not the model's; a loss that has some belongs into "
            "it: nn.ModuleDict({'net': net, 'loss': loss})"
        )
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, calls in (norm_calls or {}).items():
        if name not in norms or calls < 1:
            raise RequestError(f"lb.distribute(norm_calls={{{name!r}: {calls}}}): no BatchNorm layer, or less than 1")
    refuse_shared_memory(model)


def refuse_unlike(world: World, model: nn.Module, optimizer: torch.optim.Optimizer, **asked: object) -> None:
    """Raise RequestError on all ranks where one asks for something else. Collective."""
    held = (*model.named_parameters(), *model.named_buffers())
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad) for name, tensor in held]
    groups = [len(group["params"]) for group in optimizer.param_groups]
    facts = {"a model of": digest(shapes), "an optimizer": f"{type(optimizer).__name__} of {groups} parameters"}
    compare(world.engine, facts | {key: str(value) for key, value in asked.items()}, "lb.distribute")


def refuse_unlike_shuffle(engine: Engine, shuffle: GlobalShuffle) -> None:
    """The same of a shuffle's order and schedule. Collective."""
    s = shuffle.schedule
    facts = {"seed": str(shuffle.seed), "start": str(shuffle.start), "steps": str(s.steps), "a schedule": outline(s)}
    compare(engine, facts, "lb.GlobalShuffle")


def compare(engine: Engine, facts: dict[str, str], asker: str) -> None:
    if engine.size > 1:
        hint = f"; {asker} takes the same on every rank"
        refuse_other(engine.gather(facts), engine.gather(socket.gethostname()), hint)


def outline(schedule: Schedule) -> str:
    steps = range(0, schedule.steps, max(1, schedule.steps // POINTS))
    return digest([schedule.samples, *(schedule.at(step) for step in steps)])


def digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def share_optimizer(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    """Rank 0's learning rates and state on every rank. Collective."""
    if engine.size == 1:
        return
    own = tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.state_dict()) if engine.rank == 0 else None
    theirs = engine.share(own)
    if engine.rank:
        groups = optimizer.param_groups  # which scripts may hold
        optimizer.load_state_dict(theirs)
        for group, loaded in zip(groups, optimizer.param_groups, strict=True):
            group.update(loaded)
        optimizer.param_groups = groups
