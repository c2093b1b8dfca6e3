"""What a script may not change behind a run, and what a forward may not: else ranks would differ without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from hpc_lbsgd.api.world import World, settings
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.train.replica import Distributed

BEFORE = "change the model before lb.distribute; afterwards make model, optimizer and run anew, and lb.load"


class Held(NamedTuple):
    """A parameter or buffer where its module has it."""

    name: str
    by: Mapping[str, torch.Tensor | None]
    key: str
    tensor: torch.Tensor


class Watch:
    """Looks at a run's parameters before each step, at its gradients between parts, at other state around a forward."""

    def __init__(self, replica: Distributed, world: World):
        self.world, self.buckets = world, replica.buckets
        held = [
            Held(f"{prefix}.{key}" if prefix else key, by, key, tensor)
            for prefix, module in replica.model.named_modules()
            for by in (module._parameters, module._buffers)
            for key, tensor in by.items()
            if tensor is not None
        ]
        self._modules = [
            (f"{prefix}.{key}" if prefix else key, module._modules, key, child)
            for prefix, module in replica.model.named_modules()
            for key, child in module._modules.items()
        ]
        self._parameters = [
            (h, h.tensor.requires_grad) for h in held if isinstance(h.tensor, nn.Parameter) and h.by[h.key] is h.tensor
        ]
        others = {name for name, _ in replica.others_now()}
        self._others = [h for h in held if h.name in others]
        # (name, parameter, where its weights lie, its gradient's place, where that lies)
        self.places = [
            (view.name, view.parameter, view.parameter.data_ptr(), place, place.data_ptr())
            for bucket in self.buckets.buckets
            for view in bucket.layout.views
            for place in (bucket.places[view.name],)
        ]
        self._trained = {id(parameter) for _, parameter, *_ in self.places}
        self._versions: list[int] = []

    # ---------------------------------------------------------------- before a step

    def check(self) -> None:
        """Raise RunError where what trains, or how this process computes, is not what `lb.distribute` saw."""
        if self.world.settled:
            for name, now in settings(self.world.device).items():
                if now != self.world.settled[name]:
                    raise RunError(
                        f"{name} is {now}, and lb.init settled {self.world.settled[name]} for determinism = "
                        f"{self.world.determinism}: kernels, and so the bits, depend on it; leave it as it was"
                    )
        for name, by, key, child in self._modules:
            if by.get(key) is not child:
                raise RunError(
                    f"{name} is not the layer that lb.distribute saw: neither the sums nor the optimizer have it; "
                    f"{BEFORE}"
                )
        for held, trains in self._parameters:
            if held.by.get(held.key) is not held.tensor:
                raise RunError(
                    f"{held.name} is not the parameter that lb.distribute saw (load_state_dict(assign=True), a "
                    f"reparametrisation): neither the sums nor the optimizer have it; {BEFORE}"
                )
            if held.tensor.requires_grad != trains:
                what = "it still decays, and moves by its momentum" if trains else "its gradients are in no sum"
                raise RunError(
                    f"requires_grad of {held.name} was changed since lb.distribute, and {what}: to hold a layer for a "
                    "while, give it a group of the optimizer with lr = 0 and weight_decay = 0"
                )
        for name, parameter, weights, place, gradient in self.places:
            if parameter.data_ptr() != weights or place.data_ptr() != gradient:
                raise RunError(
                    f"{name} does not lie where lb.distribute has put it (model.to(...), .double(), parameter.data = "
                    f"...): its gradients would go nowhere; {BEFORE}"
                )

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise RunError where the optimizer would take a rank's own gradient for the sum."""
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) not in self._trained:
                    raise RunError(
                        f"optimizer.step: group {number} has a parameter of shape {tuple(parameter.shape)} that "
                        f"lb.distribute did not see train, and its gradient is this rank's own; {BEFORE}"
                    )

    # ---------------------------------------------------------------- in a step

    def note_gradients(self) -> None:
        """After a part: what is in the gradients now is the run's."""
        self._versions = [bucket.gradients._version for bucket in self.buckets.buckets]

    def check_gradients(self, step: int) -> None:
        """Raise RunError where gradients were cleared, scaled or replaced since the last part."""
        for name, parameter, _, place, _ in self.places:
            if parameter.grad is not place:
                raise RunError(
                    f"the gradient of {name} was replaced between the parts of step {step}: clear gradients after "
                    "optimizer.step(), not inside a step"
                )
        if self._versions != [bucket.gradients._version for bucket in self.buckets.buckets]:
            raise RunError(
                f"gradients were changed between the parts of step {step}, or before run.reduce: they are sums under "
                "way; clip them, clear them and look at them after run.reduce(step)"
            )

    def others(self) -> list[tuple[int, int]]:
        """Of what no step changes, as it is now: another value after any change."""
        now = [held.by.get(held.key) for held in self._others]
        return [(id(t), -1 if t is None or t.is_inference() else t._version) for t in now]

    def check_others(self, before: list[tuple[int, int]]) -> None:
        """Raise RunError where a forward changed what it does not account for."""
        for held, then, now in zip(self._others, before, self.others(), strict=True):
            if then != now:
                raise RunError(
                    f"{held.name} was changed inside of run.part: every rank changes it by itself, for its own parts, "
                    "and the result would depend on their number; a forward may change BatchNorm's statistics alone. "
                    "Change it between steps, on all ranks alike, from what all of them know"
                )
