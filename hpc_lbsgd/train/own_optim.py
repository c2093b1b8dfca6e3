"""Optimizers that are not ours: any class of torch.optim by name, or one of the user's. They step the parameters
themselves, which are views into the buckets, so that no layout of buckets changes what they compute.

A step hands them the reduced gradient in `.grad`: the sum over all samples divided by kn, on every rank the same.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hpc_lbsgd.errors import RequestError, RunError, did_you_mean
from hpc_lbsgd.imports import load, place_of
from hpc_lbsgd.theory.schedule import Point

Named = Sequence[tuple[str, nn.Parameter]]

# Keyword arguments that other keys of a recipe decide
DECIDED = {
    "lr": "optim.base_lr and the schedule",
    "weight_decay": "optim.weight_decay",
    "momentum": "optim.momentum",
}


def found(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The class or function that `optim.name` names. Raises RequestError for what is none, or cannot be used."""
    if ":" in name:
        return load(name, "optim.name")
    everything = (c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer))
    classes = {c.__name__.lower(): c for c in everything if c is not torch.optim.Optimizer}
    if name not in classes:
        known = sorted({"lars", *classes} - {"lbfgs", "sparseadam"})
        raise RequestError(
            f"optim.name = {name}: not an optimizer; allowed: {', '.join(known)}, or package.module:function"
            + did_you_mean(name, known)
        )
    return classes[name]


def refuse_closure(kind: object, what: str) -> None:
    """Raise RequestError for an optimizer whose step must be given a closure. kind: it, or its class."""
    parameters = inspect.signature(kind.step).parameters.values() if hasattr(kind, "step") else ()
    if any(p.name == "closure" and p.default is p.empty for p in parameters):
        raise RequestError(
            f"{what} steps by closures, which compute forward and backward outside of the passes that are summed over "
            "ranks"
        )


def refuse_sparse(kind: object, what: str) -> None:
    """Raise RequestError for an optimizer of sparse gradients. kind: it, or its class."""
    if kind is torch.optim.SparseAdam or isinstance(kind, torch.optim.SparseAdam):
        raise RequestError(f"{what} wants sparse gradients, and sums over ranks are dense; adam, adamw take those")


def arguments(make: Callable, section) -> dict[str, Any]:
    """The keyword arguments for `make`, from a recipe's `optim` section. Raises RequestError for options that it does
    not take, or that other keys decide."""
    what = f"optim.name = {section.name}"
    try:
        taken = inspect.signature(make).parameters
    except (TypeError, ValueError):
        raise RequestError(f"{what}: {type(make).__name__}, not a class or function") from None
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    names = [p.name for p in list(taken.values())[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if "lr" not in names and not anything:
        raise RequestError(f"{what}: takes no lr, and the schedule decides it")
    own, m = [n for n in names if n not in DECIDED], section.momentum
    for key, value in section.options.items():
        if key in DECIDED:
            raise RequestError(f"optim.options.{key} = {value}: decided by {DECIDED[key]}")
        if key not in own and not anything:
            raise RequestError(
                f"optim.options.{key} = {value}: {section.name} takes {', '.join(own) or 'no options'}"
                + did_you_mean(key, own)
            )
        if key == "betas" and key in names and isinstance(value, list) and value[:1] != [m]:
            raise RequestError(f"optim.options.betas = {value}: the first is optim.momentum = {m}; set both alike")
    given: dict[str, Any] = {"lr": section.base_lr}
    decay = section.weight_decay if section.decay_in == "gradient" else 0.0
    betas = taken["betas"].default if "betas" in names else ()
    others = betas[1:] if isinstance(betas, (tuple, list)) else (section.beta2,)
    decided = {"weight_decay": decay, "momentum": m, "betas": (m, *others)}
    given |= {key: value for key, value in decided.items() if key in names}
    given |= {key: tuple(v) if isinstance(v, list) else v for key, v in section.options.items()}
    if missing := [n for n in names if taken[n].default is inspect.Parameter.empty and n not in given]:
        raise RequestError(f"{what}: needs optim.options.{missing[0]}")
    return given


def check(section) -> None:
    """Raise RequestError for an `optim` section that names nothing, or with options that it does not take."""
    make = found(section.name)
    refuse_closure(make, f"optim.name = {section.name}:")
    refuse_sparse(make, f"optim.name = {section.name}:")
    arguments(make, section)


class ByParameter:
    """`optim.Optimizer`'s methods, by an optimizer over named parameters.

    Vectors (biases, BatchNorm) are in a group of their own, without weight decay. lr is the schedule's times what a
    group's was of the one that the optimizer was made with (layer-wise rates); momentum and betas the recipe's.
    """

    masked = False  # what it keeps may be made in its first step, or be numbers of the host

    def __init__(self, named: Named, section):
        self.named, self.skipped = named, 0
        self.what = f"optim.name = {section.name}"
        check(section)
        make = found(section.name)
        given = arguments(make, section)
        decay = section.weight_decay if section.decay_in == "gradient" else 0.0
        split = [[(n, p) for n, p in named if (p.dim() > 1) == matrices] for matrices in (True, False)]
        groups = [{"params": g, "weight_decay": d} for g, d in zip(split, (decay, 0.0), strict=True) if g]
        try:
            self.inner = make(groups, **given)
        except Exception as problem:  # anyone's code
            raise RequestError(f"{self.what}: {type(problem).__name__}: {problem}{place_of(problem)}") from None
        if not isinstance(self.inner, torch.optim.Optimizer):
            raise RequestError(f"{self.what}: returned {type(self.inner).__name__}, not a torch.optim.Optimizer")
        refuse_closure(self.inner, f"{self.what}:")
        refuse_sparse(self.inner, f"{self.what}:")
        if decay and "weight_decay" not in self.inner.defaults:
            raise RequestError(
                f"optim.weight_decay = {section.weight_decay}: {section.name} has no weight decay; allowed: 0, or "
                "optim.decay_in = loss"
            )
        self._refuse_other_parameters()
        self.scales = [group.get("lr", section.base_lr) / section.base_lr for group in self.inner.param_groups]
        self.takes = given.keys() & {"momentum", "betas"}
        self._places = [(name, p, p.data_ptr()) for name, p in named]

    def _refuse_other_parameters(self) -> None:
        stepped = [id(p) for group in self.inner.param_groups for p in group["params"]]
        own = {id(p): name for name, p in self.named}
        if missed := own.keys() - set(stepped):
            name = min(own[i] for i in missed)
            raise RequestError(f"{self.what}: {name} is in none of its groups, and no step would move it")
        if set(stepped) - own.keys() or len(stepped) > len(own):
            raise RequestError(f"{self.what}: its groups hold other parameters than the model's, or one twice")

    def step(self, point: Point, previous_lr: float, ok: None = None) -> None:
        """Update the weights from the reduced gradients."""
        for group, scale in zip(self.inner.param_groups, self.scales, strict=True):
            group["lr"] = point.lr * scale
            if "momentum" in self.takes and "momentum" in group:
                group["momentum"] = point.momentum
            if "betas" in self.takes and "betas" in group:
                group["betas"] = (point.momentum, *group["betas"][1:])
        self.inner.step()
        for name, parameter, place in self._places:
            if parameter.data_ptr() != place:
                raise RunError(
                    f"{self.what}: has put another tensor in the place of {name}; an optimizer must change weights in "
                    "place"
                )

    def state(self) -> dict[str, Any]:
        """{"state": {parameter name: ...}, "groups": [...]}: all that its state dict has."""
        state, groups = by_name(self.inner, self.named)
        return {"state": state, "groups": groups}

    def load(self, content: Mapping[str, Any], where: str) -> None:
        """Put `state()` back. Raises RequestError where it is another optimizer's."""
        try:
            load_by_name(self.inner, self.named, content["state"], content["groups"])
        except (KeyError, ValueError, TypeError) as problem:
            raise RequestError(f"{where}: the checkpoint is of another optimizer ({problem})") from None

    def synchronise(self, engine, device: torch.device) -> None:
        """Rank 0's state on every rank. Collective."""
        if engine.size == 1:
            return
        mine = self.state()
        blank = engine.share(mapped(mine, lambda t: Blank(tuple(t.shape), t.dtype, t.device.type)))
        content = mine if engine.rank == 0 else mapped(blank, lambda b: b.tensor(device), Blank)
        for i, tensor in enumerate(leaves(content)):
            if tensor.numel():  # as bytes, for engines do not know all types
                sent = tensor.detach().contiguous().view(-1).view(torch.uint8).to(device)
                engine.broadcast(sent, f"optimizer.{i}")
                tensor.copy_(sent.to(tensor.device).view(tensor.dtype).view(tensor.shape))
        if engine.rank:
            self.load(content, "rank 0")

    def __str__(self) -> str:
        group = {k: v for k, v in self.inner.param_groups[0].items() if k not in ("params", "param_names", "lr")}
        return f"{type(self.inner).__name__}({', '.join(f'{k}={v}' for k, v in group.items())})"


class Blank(NamedTuple):
    """A tensor's place in a state, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def tensor(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device if self.device == device.type else self.device)


def mapped(value: Any, change: Callable, kind: type = torch.Tensor) -> Any:
    """A nest of dicts, lists and tuples with what is of `kind` in it changed, and all else copied."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(inner, change, kind) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        inside = [mapped(inner, change, kind) for inner in value]
        return inside if isinstance(value, list) else tuple(inside)
    return copy.deepcopy(value)


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nest, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)


# ---------------------------------------------------------------- state by name


def numbers(optimizer: torch.optim.Optimizer, named: Named) -> dict[int, str]:
    """Parameters' names by their number in the optimizer's state dict."""
    names = {id(p): name for name, p in named}
    return dict(enumerate(names[id(p)] for group in optimizer.param_groups for p in group["params"]))


def by_name(optimizer: torch.optim.Optimizer, named: Named) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An optimizer's state dict as ({parameter name: its state}, groups with names)."""
    names, found = numbers(optimizer, named), optimizer.state_dict()
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in found["param_groups"]]
    return {names[i]: value for i, value in found["state"].items()}, groups


def load_by_name(
    optimizer: torch.optim.Optimizer, named: Named, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Put what `by_name` gave back. Raises ValueError where the groups hold other parameters."""
    own = {name: i for i, name in numbers(optimizer, named).items()}
    _, there = by_name(optimizer, named)
    if [group["params"] for group in groups] != [group["params"] for group in there]:
        raise ValueError("the optimizer's groups hold other parameters than the file's")
    content = {own[name]: value for name, value in state.items()}
    counted = [{**group, "params": [own[n] for n in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": content, "param_groups": counted})


# ---------------------------------------------------------------- a trial, before the first step


def trial(section, named: Named, gradients: Mapping[str, torch.Tensor]) -> tuple[str | None, list[torch.Tensor]]:
    """Two steps on copies of parameters, the second one also by an optimizer that has read the first one's state from a
    file: (what is wrong, the weights after both).

    Raises RequestError where it cannot step.
    """
    section = section.model_copy(update={"base_lr": 1.0})  # which may be amended, and the trial is compared
    first = _on_copies(section, named)
    _step(first, gradients, 0)
    file = io.BytesIO()
    try:
        torch.save(first.state(), file)
        content = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as problem:
        return f"its state cannot be kept in a checkpoint: {str(problem).splitlines()[0]}", []
    again = _on_copies(section, first.named)
    again.load(content, "its own state")
    for optimizer in (first, again):
        _step(optimizer, gradients, 1)
    for (name, a), (_, b) in zip(first.named, again.named, strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return (
                f"{name} takes another step after its state was read from a file: it keeps something beside its state "
                "dict, or draws, and neither a resume nor other ranks would have it",
                [],
            )
    return None, [p.detach() for _, p in first.named]


def _on_copies(section, named: Named) -> ByParameter:
    return ByParameter([(name, nn.Parameter(p.detach().clone())) for name, p in named], section)


def _step(optimizer: ByParameter, gradients: Mapping[str, torch.Tensor], number: int) -> None:
    for name, parameter in optimizer.named:
        parameter.grad = gradients[name] * (1.0, -0.75)[number]
    try:
        optimizer.step(Point(number, 0, number, 0.01, 0.9, 1, 1, 0, 1), 0.01)
    except Exception as problem:
        raise RequestError(f"{optimizer.what}: {type(problem).__name__}: {problem}{place_of(problem)}") from None
