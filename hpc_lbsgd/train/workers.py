"""Layers that see virtual workers: what the hardware does must not show in the result.

A pass may hold several workers. BatchNorm normalises groups of `bn_group` samples, each inside one worker; dropout
draws one mask a worker. Layers stay what the user wrote: an instance's forward is wrapped, its class, parameters and
own forward are kept. All learn from a shared `PassContext` who is in the pass.
"""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpc_lbsgd.data.order import stream_key
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.train.refusals import refuse


class Span(NamedTuple):
    """Samples [start, stop) of a worker's `count`."""

    worker: int
    start: int
    stop: int
    count: int


@dataclass(eq=False)
class PassContext:
    """The pass under way: its workers, how many samples each has, and BatchNorm's groups."""

    seed: int
    bn_group: int
    step: int = 0
    spans: list[Span] = field(default_factory=list)  # what an input holds: its samples, in order; none outside a pass
    groups: list[Span] = field(default_factory=list)  # the BatchNorm groups among them
    samples_per_worker: int | None = None  # of a whole worker; set where parts are compiled, which are for those alone
    whole: bool = False  # all workers of the pass are
    sizes: list[int] = field(default_factory=list)  # theirs: all that compiled layers look at
    layers: list[VirtualLayer] = field(default_factory=list)
    outside: str | None = None  # why layers must not measure or draw outside a pass, where that is refused
    _calls_by_draw: dict[int, list[int] | None] = field(default_factory=dict)

    def __post_init__(self):
        self.number = next(_numbers)
        CONTEXTS[self.number] = self

    def __getstate__(self) -> dict:
        """Of a copy, an average of weights, say: no pass is under way there, and nobody sums what it measures."""
        none = {"spans": [], "groups": [], "sizes": [], "_calls_by_draw": {}}
        return vars(self) | none | {"whole": False, "outside": None}

    def begin(self, step: int, workers: list[int], counts: list[int]) -> None:
        self.step = step
        spans = [Span(worker, 0, count, count) for worker, count in zip(workers, counts, strict=True)]
        groups = [
            Span(s.worker, start, min(start + self.bn_group, s.count), s.count)
            for s in spans
            for start in range(0, s.count, self.bn_group)
        ]
        self._hold(spans, groups)
        self.whole = all(count == self.samples_per_worker for count in counts)
        self._calls_by_draw.clear()
        for layer in self.layers:
            layer.calls = 0
        # For models that draw outside nn.Dropout: exact with one worker a pass. Not torch.manual_seed, which formats
        # a stack trace where CUDA is idle: 0.16 ms a pass.
        key = stream_key("model", self.seed, step, workers[0])
        torch.default_generator.manual_seed(key)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(key)

    def end(self) -> None:
        """After backward: layers that are called from now on are in no pass."""
        self._hold([], [])
        self.whole = False

    def _hold(self, spans: list[Span], groups: list[Span]) -> None:
        self.spans, self.groups = spans, groups
        self.sizes = [g.stop - g.start for g in groups]

    @contextmanager
    def within(self, group: Span) -> Iterator[None]:
        """What is called here sees one BatchNorm group."""
        spans, groups = self.spans, self.groups
        self._hold([group], [group])
        try:
            yield
        finally:
            self._hold(spans, groups)

    def settle(self, layers: list[VirtualLayer]) -> None:
        """Before a call of these layers: where backward repeats it, their calls are counted from where they were.

        Checkpointing restores the state of torch's generator before it computes again what it forgot, so that a draw
        tells which call is repeated.
        """
        draw = int(torch.empty((), dtype=torch.int64).random_())
        if not in_backward():
            again = draw in self._calls_by_draw
            self._calls_by_draw[draw] = None if again else [layer.calls for layer in layers]
            return
        calls = self._calls_by_draw.get(draw)
        if calls is None:
            names = ", ".join(layer.name for layer in layers[:3])
            raise RunError(
                f"{names}: computed again in backward from another state of torch's generator than in forward, and "
                "would draw another mask; checkpoint it with preserve_rng_state=True"
            )
        for layer, number in zip(layers, calls, strict=True):
            layer.calls = number


# Contexts by number, for compiled code: a graph holds numbers, not objects.
CONTEXTS: dict[int, PassContext] = WeakValueDictionary()
_numbers = itertools.count()


def in_backward() -> bool:
    """Autograd is at work on this thread: what is called now was forgotten and is computed again."""
    return torch._C._current_graph_task_id() != -1


def group_sizes(count: int, bn_group: int) -> list[int]:
    """`count` samples of one worker in groups of `bn_group`; a short tail worker ends with a smaller group."""
    full, rest = divmod(count, bn_group)
    return [bn_group] * full + ([rest] if rest else [])


def groups_in_step(point, bn_group: int) -> int:
    """BatchNorm groups of one step over all workers, from its schedule point alone."""
    full, rest = divmod(point.count, point.samples_per_worker)
    return full * len(group_sizes(point.samples_per_worker, bn_group)) + len(group_sizes(rest, bn_group))


class VirtualLayer(ABC):
    """A module of the model whose own forward runs through here."""

    def __init__(self, name: str, module: nn.Module, context: PassContext):
        self.name, self.module, self.context = name, module, context
        self.own = module.forward  # of the instance, if it has one; else of its class
        self.calls = 0  # in the forward under way
        module.forward = self.forward
        context.layers.append(self)

    def __getstate__(self) -> dict:
        """`own` as a class has it is found there again: under its name the module has this layer's forward."""
        plain = getattr(self.own, "__func__", None) is type(self.module).forward
        return vars(self) | {"own": None if plain else self.own}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.own = self.own or MethodType(type(self.module).forward, self.module)

    def count_call(self) -> int:
        self.calls += 1
        return self.calls - 1

    @abstractmethod
    def forward(self, *inputs, **named) -> torch.Tensor:
        """In place of the module's own."""

    def check_rows(self, x: torch.Tensor) -> None:
        """Several workers or groups can be told apart only where the input has a row a sample."""
        samples = sum(self.context.sizes)
        if x.shape[0] != samples:
            raise RunError(
                f"{self.name} ({type(self.module).__name__}) gets {x.shape[0]} rows for {samples} samples, and cannot "
                "tell whose they are: set machine.workers_per_pass = 1 and batch.bn_group = batch.samples_per_worker"
            )


# Their forward is known, and can be told where to leave its statistics.
PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Slot(NamedTuple):
    """Where one call of a BatchNorm in a forward leaves what it measures."""

    table: torch.Tensor  # (groups, 2 C): means, and unbiased variances
    groups: list[tuple[torch.Tensor, torch.Tensor]]  # both of each group, as views


class VirtualNorm(VirtualLayer):
    """Any BatchNorm over groups of `bn_group` samples (Goyal et al. 2017, section 2.3: n is part of the objective).

    While training, running statistics are not touched. Each call leaves each group's mean and unbiased variance in
    `slots[call]` and counts the groups that measured; from their sums over all ranks every rank makes the same
    moving average (`statistics.RunningStatistics`). A layer that is not training is as its author wrote it.
    """

    def __init__(self, name: str, module: _BatchNorm, context: PassContext):
        super().__init__(name, module, context)
        self.first = next(iter(inspect.signature(self.own).parameters))  # its author's name for the input
        self.plain = type(module) in PLAIN_NORMS and getattr(self.own, "__func__", None) is type(module).forward
        self.tracks = module.track_running_stats and module.running_mean is not None
        self.slots: list[Slot] = []  # by call, of the pass under way
        self.measured: list[int] = []  # groups, by call, in the pass under way
        self.inside: list[VirtualLayer] = []  # virtual layers that are parts of this module
        self.at_once: Callable | None = None  # `ghost.batch_norm`, where a compiler makes it

    def forward(self, *inputs, **named) -> torch.Tensor:
        x, *more = inputs if inputs else (named.pop(self.first),)
        sizes = self.context.sizes
        if not self.module.training or not sizes:
            if self.module.training and self.tracks and self.context.outside:
                raise RunError(f"{self.name} ({type(self.module).__name__}): {self.context.outside}")
            return self.own(x, *more, **named)
        call = self._call()
        if len(sizes) == 1:
            return self._group(x, call, 0, more, named)
        self.check_rows(x)
        if self.at_once and self.context.whole and x.numel() > len(sizes) * x.shape[1]:
            return self._groups_at_once(x, call, len(sizes))
        cut = [split_like(value, x, sizes) for value in more]
        cut_named = {key: split_like(value, x, sizes) for key, value in named.items()}
        before = [layer.calls for layer in self.inside]
        results = []
        for number, part in enumerate(x.split(sizes)):
            for layer, calls in zip(self.inside, before, strict=True):
                layer.calls = calls  # each group makes the same calls
            own = [values[number] for values in cut], {key: values[number] for key, values in cut_named.items()}
            results.append(self._group(part, call, number, *own))
            if not isinstance(results[-1], torch.Tensor):
                raise RunError(
                    f"{self.name} ({type(self.module).__name__}) returns {type(results[-1]).__name__}, and groups are "
                    "put together from tensors: set machine.workers_per_pass = 1 and batch.bn_group = "
                    "batch.samples_per_worker"
                )
        return torch.cat(results)

    def _call(self) -> int:
        # Statistics were taken when forward ended: where a repeated call leaves its own does not matter.
        if not torch.compiler.is_compiling() and in_backward():
            return 0
        call = self.count_call()
        if self.tracks and call >= len(self.slots):
            raise RunError(
                f"{self.name} ({type(self.module).__name__}) is called {call + 1} times in a forward, and in the one "
                f"before the first step was called {len(self.slots)} times: a BatchNorm whose calls depend on the data "
                "has no place for its statistics; use a layer a call, or say how many there are: "
                f"lb.distribute(norm_calls={{{self.name!r}: {call + 1}}})"
            )
        return call

    def _group(self, x: torch.Tensor, call: int, group: int, more=(), named=None) -> torch.Tensor:
        module, arguments = self.module, (more, named or {})
        mean, variance = self.slots[call].groups[group] if self.tracks else (None, None)
        if x.numel() == x.shape[1]:  # one value a channel has no variance: it normalises to zero, and says nothing
            like = x if module.running_mean is None else module.running_mean
            return self._run(x - x, group, like.new_zeros(x.shape[1]), like.new_ones(x.shape[1]), False, *arguments)
        if self.tracks:
            self.measured[call] += 1
            if not self.plain:  # for forwards that read them while they train
                mean.copy_(module.running_mean)
                variance.copy_(module.running_var)
        return self._run(x, group, mean, variance, True, *arguments)

    def _groups_at_once(self, x: torch.Tensor, call: int, groups: int) -> torch.Tensor:
        """All groups of a pass of whole workers, which are equal."""
        module = self.module
        y, statistics = self.at_once(x, groups, module.weight, module.bias, module.eps)
        if self.tracks:
            self.measured[call] += groups
            self.slots[call].table.copy_(statistics)
        return y

    def _run(self, x: torch.Tensor, group: int, mean, variance, training: bool, more, named) -> torch.Tensor:
        """The forward on one group, with other buffers in place of the running statistics. With momentum 1 they come
        back holding this group's mean and unbiased variance."""
        if self.plain:
            return F.batch_norm(x, mean, variance, self.module.weight, self.module.bias, training, 1.0, self.module.eps)
        return self._run_own(x, group, mean, variance, training, more, named)

    def keep_out_of_graphs(self) -> None:
        """Where parts of the model are compiled: a forward of the user's own, on other buffers, stays as it is. Not a
        decorator, which would load torch's compiler in every rank."""
        self._run_own = torch.compiler.disable(self._run_own)

    def _run_own(self, x: torch.Tensor, group: int, mean, variance, training: bool, more, named) -> torch.Tensor:
        module, buffers = self.module, self.module._buffers
        kept = {name: buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked")}
        momentum = module.momentum
        buffers["running_mean"], buffers["running_var"] = mean, variance
        if kept["num_batches_tracked"] is not None:
            buffers["num_batches_tracked"] = kept["num_batches_tracked"].clone()
        module.momentum, module.training = 1.0, training
        try:
            with self.context.within(self.context.groups[group]):
                return self.own(x, *more, **named)
        finally:
            buffers.update(kept)
            module.momentum, module.training = momentum, True


def split_like(value: object, x: torch.Tensor, sizes: list[int]) -> Sequence:
    """What each group gets of an argument beside `x`: its rows, where it has a row for each of x's; else all of it."""
    rows = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == x.shape[0]
    if rows and value.dim() == 1 and x.shape[0] == x.shape[1]:
        raise RunError(
            f"a BatchNorm's second input of {len(value)} elements may be one a sample or one a channel: set "
            "machine.workers_per_pass = 1 and batch.bn_group = batch.samples_per_worker, or give it two dimensions"
        )
    return value.split(sizes) if rows else [value] * len(sizes)


# nn.Dropout2d drops whole channels: its mask has size 1 in the last 2 dimensions
DROPOUTS = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


class VirtualDropout(VirtualLayer):
    """Dropout whose mask is a function of (seed, layer, call in this forward, step, worker)."""

    def __init__(self, name: str, module: nn.Dropout, context: PassContext):
        super().__init__(name, module, context)
        self.shared_dims = DROPOUTS[type(module)]
        self.place = len(context.layers) - 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name, for calls that use it
        x, module, context = input, self.module, self.context
        if not module.training or module.p == 0 or not context.spans:
            stray = module.training and module.p > 0 and context.outside and torch.is_grad_enabled()
            if stray and not any(c.spans for c in CONTEXTS.values()):  # in another run's part that one's key draws
                raise RunError(f"{self.name} ({type(module).__name__}): {context.outside}")
            return self.own(x)
        if torch.compiler.is_compiling():
            mask = keyed_mask(x.detach(), context.number, self.place, self.count_call())
        else:
            context.settle([self])
            mask = self.mask(x, self.count_call())
        scale = 1 / (1 - module.p) if module.p < 1 else 0.0  # apart: in bf16 it would be rounded first
        return x.mul_(mask).mul_(scale) if module.inplace else x * mask * scale

    def mask(self, x: torch.Tensor, call: int) -> torch.Tensor:
        """1 for what stays of `x`, 0 for what does not."""
        context, p = self.context, self.module.p
        if len(context.spans) > 1:
            self.check_rows(x)
        masks = []
        for span in context.spans:
            key = stream_key("dropout", context.seed, self.name, call, context.step, span.worker)
            generator = torch.Generator(x.device).manual_seed(key)
            # an input may have more rows than samples (heads, places): one worker's are all of them
            rows, part = x.shape[0], slice(None)
            if len(context.spans) > 1 or rows == span.stop - span.start:
                rows, part = span.count, slice(span.start, span.stop)
            shape = (rows, *x.shape[1:])
            if self.shared_dims:
                shape = (*shape[: len(shape) - self.shared_dims], *[1] * self.shared_dims)
            masks.append((torch.rand(shape, generator=generator, device=x.device) >= p)[part])
        return torch.cat(masks).to(x.dtype)


@torch.library.custom_op("hpc_lbsgd::keyed_mask", mutates_args=())
def keyed_mask(x: torch.Tensor, context: int, place: int, call: int) -> torch.Tensor:
    """`VirtualDropout.mask` as one opaque operation of a compiled graph. Pure within a pass: where backward computes
    it again, it is the same."""
    return CONTEXTS[context].layers[place].mask(x, call)


@keyed_mask.register_fake
def _(x: torch.Tensor, context: int, place: int, call: int) -> torch.Tensor:
    shared = CONTEXTS[context].layers[place].shared_dims
    return x.new_empty((*x.shape[: x.dim() - shared], *[1] * shared))


# ---------------------------------------------------------------- a model


def make_virtual(model: nn.Module, context: PassContext) -> list[VirtualNorm]:
    """Wrap the BatchNorm and dropout layers of `model`; returns the BatchNorm layers with running statistics.

    Raises RequestError for layers whose state would depend on how many ranks there are.
    """
    found: dict[nn.Module, VirtualLayer] = {}
    for name, module in model.named_modules():
        refuse(name, module)
        if isinstance(module, _BatchNorm):
            found[module] = VirtualNorm(name, module, context)
        elif type(module) in DROPOUTS and "forward" not in vars(module):  # else what it does is its author's
            found[module] = VirtualDropout(name, module, context)
    norms = [layer for layer in found.values() if isinstance(layer, VirtualNorm)]
    for norm in norms:
        norm.inside = [found[m] for m in norm.module.modules() if m in found and m is not norm.module]
    return [norm for norm in norms if norm.tracks]
