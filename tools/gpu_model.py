#!/usr/bin/env python3
"""What a training step asks of a GPU, counted without one: a whole step runs on torch's `meta` device, where tensors
have shapes and no contents, and every operation is seen on its way (TorchDispatchMode).

python tools/gpu_model.py [--batch 256] [--determinism any-ranks] [--compile stages]

Launches: operations that are more than a view, a convolution's backward as two. Bytes: what an operation reads and
writes if nothing stays in a cache. Neither is a time; how they become one is docs/results/gpu-model.md's to say.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_fused import Fused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import control, step
from hpc_lbsgd.train.replica import Replica

META = torch.device("meta")
# operations that launch nothing, beside views
FREE = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::detach",
    "aten::_local_scalar",
)
TWICE = ("aten::convolution_backward", "aten::native_batch_norm_backward")  # gradients of inputs and of weights


class Alone:
    """An engine of one rank whose sums cost nothing. waited: is called where a sum is waited for."""

    name, rank, size, local_rank, local_size, sums_gradients, named_sums = "alone", 0, 1, 0, 1, False, True

    def __init__(self, waited: Callable[[], None] = lambda: None):
        self.waited = waited

    def start_sum(self, tensor, name):
        return name

    def wait(self, handle):
        self.waited()


@contextmanager
def bf16() -> Iterator[None]:
    """Autocast, which torch does not have on meta: products take their inputs in bf16, weights cast once a pass."""

    def convolution(self, x, weight, bias):
        own = bias if bias is None else bias.bfloat16()
        return torch.conv2d(x.bfloat16(), weight.bfloat16(), own, self.stride, self.padding, self.dilation, self.groups)

    def linear(self, x):
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())

    with patch.object(nn.Conv2d, "_conv_forward", convolution), patch.object(nn.Linear, "forward", linear):
        yield


@dataclass
class Cost:
    """Of one operation's calls in a step."""

    launches: int = 0
    bytes: int = 0


@dataclass
class Seen(TorchDispatchMode):
    """What a step did. reads: where the host waited for the device, by operation; copies: from one device to
    another. at: launches before the last read, the last wait for a sum, and the end of the update."""

    costs: dict[str, Cost] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    at: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = [t for t in given if t.device.type == "meta"]
        if name == "aten::_local_scalar_dense" and on_device:
            self._read(name)
            return 1
        if name in ("aten::_to_copy", "aten::copy_") and on_device:
            target = kwargs.get("device") or (given[0].device if name == "aten::copy_" else None)
            if target is not None and torch.device(target).type == "cpu":  # the host wants to know
                self._read(name)
                return answer(given[0])
        made = func(*args, **kwargs)
        results = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "meta" for t in results) and any(t.device.type == "cpu" and t.dim() for t in given):
            self.copies.append(name)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not name.startswith(FREE) and any(t.device.type == "meta" for t in (*given, *results)):
            cost = self.costs.setdefault(name, Cost())
            cost.launches += 2 if name in TWICE else 1
            touched = {id(t): t for t in (*given, *results)}.values()
            cost.bytes += sum(t.numel() * t.element_size() for t in touched)
        return made

    def _read(self, name: str) -> None:
        self.reads.append(name)
        self.mark("read")

    def mark(self, what: str) -> None:
        self.at[what] = self.launches

    @property
    def launches(self) -> int:
        return sum(cost.launches for cost in self.costs.values())

    @property
    def bytes(self) -> int:
        return sum(cost.bytes for cost in self.costs.values())


class CountedKernels:
    """In place of `parallel.kernels`: what they would touch."""

    def __init__(self, seen: Seen):
        self.seen = seen

    def _cost(self, name: str, elements: int, bytes_each: int) -> None:
        cost = self.seen.costs.setdefault(name, Cost())
        cost.launches += 1
        cost.bytes += elements * bytes_each

    def add(self, gradients, totals, flag, *units, first: bool, clear: bool) -> None:
        self._cost("kernels.add", gradients.numel(), 4 + (8 if first else 16) + (4 if clear else 0))

    def take(self, totals, gradients, *units) -> None:
        self._cost("kernels.take", gradients.numel(), 12)


def count_update(replica: Replica, seen: Seen) -> None:
    """The fused update, which torch does not have on meta: one launch for parts that are treated alike."""

    def update(point: Point, previous_lr: float, ok: torch.Tensor | None = None) -> None:
        if ok is not None:
            (~ok).float()
        for decay in {part.decay for part in replica.optimizer.parts}:
            cost = seen.costs.setdefault("fused sgd", Cost())
            cost.launches += 1
            cost.bytes += sum(5 * 4 * p.weights.numel() for p in replica.optimizer.parts if p.decay == decay)

    replica.optimizer.step = update


def answer(asked: torch.Tensor) -> torch.Tensor:
    """What the host is told: of a control vector, that the step was finite."""
    told = torch.zeros(asked.shape, dtype=asked.dtype)
    if told.dim() == 1 and len(told) > control.WORKERS:
        told[control.COUNT] = told[-1] = 1
    return told


def resnet50(batch: int, workers: int = 1, **changes) -> recipes.Recipe:
    """The recipe of a step: n = `batch` samples a worker on one rank."""
    content = {
        "model": {"name": "resnet50"},
        "data": {"classes": 1000, "samples": 1_281_167},
        "batch": {"samples_per_worker": batch, "workers": workers, "bn_group": min(batch, 32)},
    }
    recipe = recipes.Recipe.model_validate(content)
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        if section:
            value = getattr(recipe, section).model_copy(update={last: value})
        recipe = recipe.model_copy(update={section or last: value})
    return recipe


def point_of(recipe: recipes.Recipe, number: int = 1) -> Point:
    n, k = recipe.batch.samples_per_worker, recipe.batch.workers
    made = recipe.build_schedule(1_281_167).at(number)
    assert made.workers == k and made.samples_per_worker == n
    return made


def pictures(recipe: recipes.Recipe, size: int = 224) -> Batch:
    n = recipe.batch.samples_per_worker * recipe.machine.workers_per_pass
    images = torch.empty(n, 3, size, size, device=META, memory_format=torch.channels_last)
    return Batch(images, torch.zeros(n, dtype=torch.int64, device=META))


def count(recipe: recipes.Recipe, number: int = 1, plain: bool = False) -> Seen:
    """What step `number` of `recipe` does on one rank; its images are there already, and what `machine.compile` names
    is compiled. Where it is read late, from its sums to those of the next one. plain: without kernels of our own and
    the fused update, read at once."""
    seen, engine = Seen(), Alone()

    def kernel(name: str, launches: int, touched: int) -> None:
        cost = seen.costs.setdefault(f"aten::{name}", Cost())
        cost.launches += launches
        cost.bytes += touched

    with Fused(kernel), bf16() if recipe.precision == "bf16" else nullcontext():
        replica = Replica(recipe, 1000, engine, META)
        replica.autocast = False
        stepper = step.Stepper(replica, recipe, repeat(pictures(recipe)))
        stepper._late = not plain
        outcomes = stepper.outcomes(repeat(point_of(recipe, number)))
        with Seen():
            next(outcomes)  # the first makes what later ones keep
        seen.costs.clear()
        if not plain:
            if replica.buckets.fixed:
                replica.buckets.fixed.kernels = CountedKernels(seen)
            count_update(replica, seen)
        engine.waited = lambda: seen.mark("summed")
        update = replica.update
        replica.update = lambda *args: (update(*args), seen.mark("updated"))
        with seen:
            next(outcomes)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--determinism", default="off")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--compile", default="none")
    parser.add_argument("--plain", action="store_true", help="without kernels of our own and the fused update")
    args = parser.parse_args()
    choices = {"determinism": args.determinism, "precision": args.precision, "machine__compile": args.compile}
    seen = count(resnet50(args.batch, **choices), plain=args.plain)
    for name, cost in sorted(seen.costs.items(), key=lambda item: -item[1].bytes):
        print(f"{name:45s} {cost.launches:6d} launches {cost.bytes / 1e9:9.3f} GB")
    print(f"{'all':45s} {seen.launches:6d} launches {seen.bytes / 1e9:9.3f} GB")
    print(f"host reads: {dict(Counter(seen.reads))}; copies between devices: {dict(Counter(seen.copies))}")


if __name__ == "__main__":
    main()
