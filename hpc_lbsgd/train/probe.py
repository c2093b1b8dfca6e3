"""The model as its author wrote it, beside the one that trains: what wrapping it may not change.

Runs on one rank before the first step, on a few samples. Imports no engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpc_lbsgd.data.targets import Inputs, Targets, each, each_tensor, rows, turned_round
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.train import models
from hpc_lbsgd.train.attributes import snapshot
from hpc_lbsgd.train.losses import Loss
from hpc_lbsgd.train.metrics import Metric
from hpc_lbsgd.train.statistics import RunningStatistics
from hpc_lbsgd.train.workers import DROPOUTS, PassContext, VirtualDropout, make_virtual

SAMPLES = 8  # at most: one BatchNorm group
# Where a changed last bit shows as more than this share of the largest value, two models that differ by it are not
# told apart: a floor and a ceiling for what a repeat with perturbed input allows.
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-5}
CEILING = {torch.float64: 1e-6, torch.float32: 0.03}
UNIT = {torch.float64: 2.0**-40}  # by how much an input is perturbed; of other types 2^-18


class Seen(NamedTuple):
    """What one forward and backward of a model showed."""

    values: dict[str, torch.Tensor]  # outputs, losses, gradients and buffers by name
    calls: Counter  # of BatchNorm layers, by name
    changed: list[str]  # parameters and buffers that forward changed, and that are not BatchNorm's
    draws: bool  # forward drew from torch's generator


class Call(NamedTuple):
    """How to run a model: its inputs and labels, and what Replica does around a forward."""

    inputs: Inputs
    labels: Targets
    loss: Loss
    outputs: Callable[[nn.Module, Inputs], torch.Tensor]
    key: int  # for torch's generator

    def part(self, first: int, last: int) -> Call:
        """The same with some of its samples."""
        inputs, labels = (each(lambda t: t[first:last], held) for held in (self.inputs, self.labels))
        return self._replace(inputs=inputs, labels=labels)

    def perturbed(self) -> Call:
        return self._replace(inputs=each_tensor(lambda t: times(t, 1 + UNIT.get(t.dtype, 2.0**-18)), self.inputs))


def times(t: torch.Tensor, factor: float) -> torch.Tensor:
    """What is measured; counts stay."""
    return t * factor if t.is_floating_point() else t


def look(model: nn.Module, call: Call) -> Seen:
    """Forward and backward of a model as it is, in training, dropout off."""
    calls: Counter = Counter()
    norms = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    state = {name: value.clone() for name, value in everything(model)}
    # a layer's statistics may be changed by its own forward alone: as they were when that last ended, and by whom else
    known = {m: [b.clone() for b in m.buffers(recurse=False)] for m in norms}
    meddled = []

    def entered(m, _inputs=None):
        if not all(map(same, known[m], m.buffers(recurse=False))):
            meddled.append(f"{norms[m]}.running_mean".lstrip("."))

    def left(m, _inputs, _outputs):
        calls.update([norms[m]])
        known[m] = [b.clone() for b in m.buffers(recurse=False)]

    hooks = [hook for m in norms for hook in (m.register_forward_pre_hook(entered), m.register_forward_hook(left))]
    models.train(model, models.frozen_in(model))
    model.zero_grad(set_to_none=True)
    with without_dropout(model):
        torch.manual_seed(call.key)
        before = torch.get_rng_state()
        outputs = call.outputs(model, call.inputs)
        draws = not torch.equal(before, torch.get_rng_state())
        after = dict(everything(model))
        made = sorted(after.keys() - state.keys())
        if made:
            raise RequestError(f"model: {made[0]} is made by the first forward; make it where the model is made")
        changed = [n for n, value in after.items() if not same(state[n], value) and not of_norm(n, norms)]
        for norm in norms:
            entered(norm)
        changed += dict.fromkeys(meddled)
        # before backward: where it computes a layer again (checkpointing), torch counts the statistics twice
        statistics = {f"buffer {n}": b.clone() for n, b in model.named_buffers() if of_norm(n, norms)}
        for hook in hooks:
            hook.remove()
        loss = call.loss(outputs, call.labels)
        loss.backward()
    return Seen(values(model, outputs, loss) | statistics, calls, changed, draws)


def changed_by_evaluation(model: nn.Module, call: Call) -> list[str]:
    """What a forward in evaluation changes: ranks evaluate other samples, and would part. Statistics too."""
    training = {m: m.training for m in model.modules()}
    state = {name: value.clone() for name, value in everything(model)}
    model.eval()
    with torch.no_grad():
        call.outputs(model, call.inputs)
    for module, mode in training.items():
        module.training = mode
    return [n for n, value in everything(model) if n not in state or not same(state[n], value)]


def try_metrics(model: nn.Module, call: Call, metrics: Mapping[str, Metric]) -> None:
    """Ask the user's metrics once, as an evaluation will: what they cannot do shows before the first step."""
    with torch.no_grad():
        outputs = call.outputs(model, call.inputs) if metrics else None
        for metric in metrics.values():
            metric(outputs, call.labels)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where a NaN is one too."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def everything(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and all buffers, also those that are not in the state dict."""
    yield from ((n, p.detach()) for n, p in model.named_parameters())
    yield from model.named_buffers()


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def of_norm(name: str, norms: dict[nn.Module, str]) -> bool:
    """Whether this is a buffer of a BatchNorm layer that its training changes."""
    owner, _, last = name.rpartition(".")
    return last in STATISTICS and owner in norms.values()


def values(model: nn.Module, outputs, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {f"output {i}": t.detach() for i, t in enumerate(tensors(outputs))} | {"loss": loss.detach()}
    return found | {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def tensors(outputs) -> Iterator[torch.Tensor]:
    """The tensors of a model's outputs, whatever holds them."""
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from tensors(value)
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from tensors(value)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The dropout layers whose masks are ours let all through. Others draw from torch's generator in both models."""
    layers = [(m, m.p) for m in model.modules() if type(m) in DROPOUTS]
    for layer, _ in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in layers:
            layer.p = p


# ---------------------------------------------------------------- what is found


def remembers(build: Callable[[], nn.Module], call: Call) -> list[str]:
    """Names of attributes of the model and the loss that are others where another forward went before: what they hold
    is no function of what is seen last, and each rank and each start would hold its own."""
    owner = getattr(call.loss, "own", call.loss)
    owner = getattr(owner, "__self__", owner)  # a method's
    others = each_tensor(lambda t: times(t, 0.75), turned_round(call.inputs))
    other = call._replace(inputs=others, labels=turned_round(call.labels))

    def around(*calls: Call) -> tuple[dict[str, str], dict[str, str]]:
        model = build()
        models.train(model, models.frozen_in(model))
        fresh = snapshot(model)
        for one in calls:
            torch.manual_seed(one.key)
            with torch.no_grad():
                one.loss(one.outputs(model, one.inputs), one.labels)
        return fresh, snapshot(model)

    (fresh, alone), (fresh_too, both) = around(call), around(other, call)
    # numbers of handles, times, names of files are others in each model, whatever it has seen
    comparable = {name for name in fresh.keys() | alone.keys() | both.keys() if fresh.get(name) == fresh_too.get(name)}
    found = {name for name in comparable if alone.get(name) != both.get(name)}
    if first := snapshot(owner):  # there is one loss for all models: after equal forwards it is equal, or it remembers
        around(call)
        second = snapshot(owner)
        found |= {f"{n} of the loss" for n in first.keys() | second.keys() if first.get(n) != second.get(n)}
    return sorted(found)


def followers(model: nn.Module, call: Call) -> list[str]:
    """What the model's forward changes once its weights have moved, which this does: a moving average of weights, in
    the model, is equal to them at the start."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.mul_(1 + 2.0**-6)
    return look(model, call).changed


def refuse_state(model: nn.Module, changed: list[str], by: str = "each forward") -> None:
    """Raise RequestError where forward (or what `by` says) changes what is not accounted for."""
    if not changed:
        return
    name = changed[0]
    owner, _, last = name.rpartition(".")
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    raise RequestError(
        f"model: {name} of {owner or 'the model'} ({type(model.get_submodule(owner)).__name__}) is changed by "
        f"{by}{more}. Every rank and every pass would change it by itself, and the result would depend on their "
        "number: only BatchNorm's statistics may change in a forward. Leave that layer out, or freeze it"
    )


class VirtualModel:
    """A model made virtual as in training, run without an engine. bn_group: samples that BatchNorm sees together."""

    def __init__(self, model: nn.Module, seed: int, calls: Counter, dtype: torch.dtype, device: torch.device):
        self.model, self.frozen = model, models.frozen_in(model)
        self.context = PassContext(seed, SAMPLES)
        self.running = RunningStatistics(make_virtual(model, self.context), calls, dtype, device)
        self.norms = {m: name for name, m in model.named_modules() if isinstance(m, _BatchNorm)}

    def look(self, call: Call, bn_group: int = SAMPLES) -> dict[str, torch.Tensor]:
        model, context, sums = self.model, self.context, self.running.flat.new_zeros(self.running.size)
        models.train(model, self.frozen)
        model.zero_grad(set_to_none=True)
        context.bn_group = bn_group
        with without_dropout(model):
            context.begin(0, [0], [rows(call.labels)])
            groups = len(context.groups)
            torch.manual_seed(call.key)
            self.running.begin_pass(groups)
            outputs = call.outputs(model, call.inputs)
            self.running.end_forward(sums, groups, groups)
            loss = call.loss(outputs, call.labels)
            loss.backward()
            context.end()
        self.running.update(sums)
        buffers = {f"buffer {n}": b.clone() for n, b in model.named_buffers() if of_norm(n, self.norms)}
        return values(model, outputs, loss) | buffers


def in_groups(build: Callable[[], nn.Module], call: Call, bn_group: int) -> dict[str, torch.Tensor]:
    """The author's model on one BatchNorm group after the other: losses and gradients added up."""
    model, total = build(), torch.zeros(())
    models.train(model, models.frozen_in(model))
    with without_dropout(model):
        torch.manual_seed(call.key)
        for first in range(0, rows(call.labels), bn_group):
            some = call.part(first, first + bn_group)
            loss = call.loss(call.outputs(model, some.inputs), some.labels)
            loss.backward()
            total = total.to(loss) + loss.detach()
    return values(model, (), total)


def difference(own: dict, virtual: dict, perturbed: dict) -> str | None:
    """What the virtual model has otherwise than the author's; None where they are equal, up to what a small change of
    the input does."""
    endless = next((n for n, v in own.items() if v.is_floating_point() and not torch.isfinite(v).all()), None)
    if endless:
        return f"{endless} is not finite on the first samples, in the model as it was written"
    for name in own.keys() | virtual.keys():
        if name not in own or name not in virtual:
            return f"{name} is only in {'ours' if name in virtual else 'the model as it was written'}"
    scale = {}
    for name, value in own.items():
        kind = name.split()[0]
        if value.is_floating_point():
            scale[kind] = max(scale.get(kind, 0.0), value.abs().max().item() if value.numel() else 0.0)
    for name, value in own.items():
        if not value.is_floating_point():
            if not torch.equal(value, virtual[name]):
                return f"{name} is {virtual[name].tolist()}, not {value.tolist()}"
            continue
        dtype = value.dtype if value.dtype in FLOOR else torch.float32
        largest = max(value.abs().max().item() if value.numel() else 0.0, 1e-3 * scale[name.split()[0]])
        allowed = 8 * (perturbed[name] - value).abs().max().item() if name in perturbed and value.numel() else 0.0
        allowed = min(max(allowed, FLOOR[dtype] * largest), CEILING[dtype] * largest)
        worst = (virtual[name] - value).abs().max().item() if value.numel() else 0.0
        if not worst <= allowed:  # NaN is a difference
            return f"{name} differs by {worst:.2g}, where {allowed:.2g} is allowed (largest value {largest:.2g})"
    return None


def first_module(own: nn.Module, virtual: VirtualModel, call: Call) -> str:
    """The first module, in the order of the author's forward, whose output is another one in the virtual model."""
    recorded: list[list[tuple[str, torch.Tensor]]] = [[], []]
    models.train(own, models.frozen_in(own))
    with record(own, recorded[0]), without_dropout(own):
        torch.manual_seed(call.key)
        call.outputs(own, call.inputs)
    with record(virtual.model, recorded[1]):
        virtual.look(call)
    for (name, a), (other, b) in zip(*recorded, strict=False):
        if name != other:
            return f"{name} (calls come in another order)"
        tolerance = 1e-3 if a.dtype != torch.float64 else 1e-8
        if a.shape != b.shape or not (a - b).abs().max() <= tolerance * a.abs().max() + 1e-30:
            return f"{name} ({type(own.get_submodule(name)).__name__})"
    return "none: outputs of all modules are equal, what follows from them is not"


@contextmanager
def record(model: nn.Module, into: list) -> Iterator[None]:
    """Outputs of modules without children, as they come."""

    def hook(name: str):
        return lambda _m, _i, output: into.extend((name, t.detach().double().clone()) for t in tensors(output))

    hooks = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if n and not list(m.children())]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def wrong_mask(virtual: VirtualModel, device: torch.device) -> str | None:
    """The first dropout layer whose masks have another rate than its own, or do not differ by call and worker."""
    x = torch.ones(1, 16, 16, 16, device=device)  # of one sample: a rate can be seen in 16 channels and 256 places
    context = virtual.context
    for layer in context.layers:
        if not isinstance(layer, VirtualDropout) or not 0 < layer.module.p < 1:
            continue
        drawn = []
        for worker, call in ((0, 0), (0, 1), (1, 0)):
            context.begin(0, [worker], [256])
            drawn.append(layer.mask(x.expand(256, -1, -1, -1) if layer.shared_dims else x, call) != 0)
        context.end()
        kept, count = drawn[0].float().mean().item(), drawn[0].numel()
        p = layer.module.p
        if abs(kept - (1 - p)) > 6 * (p * (1 - p) / count) ** 0.5:
            return f"{layer.name} keeps {kept:.3f} for p = {p}"
        rare = min(p, 1 - p) * count < 20  # two masks may well be one by chance
        if not rare and any(torch.equal(drawn[0], other) for other in drawn[1:]):
            return f"{layer.name} draws one mask for two calls or workers"
    return None
