"""Optimizers over flat buckets: a few long vectors instead of many parameters.

Each is a class of a few lines with the equation it computes. What they keep between steps is by kind ("momentum",
"second") one flat tensor a bucket, so that a checkpoint can name it by parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.sgd import sgd

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.sections import OPTIMIZERS
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train.own_optim import ByParameter


def no_decay_names(model: nn.Module) -> set[str]:
    """Parameters without weight decay: BatchNorm's gamma and beta, and biases (Goyal et al. 2017, section 5.1;
    Jia et al. 2018 for biases)."""
    return {name for name, p in model.named_parameters() if p.dim() <= 1}


class Part(NamedTuple):
    """One flat run of parameters that are treated alike; all tensors are views of the same length."""

    weights: torch.Tensor
    gradients: torch.Tensor
    state: dict[str, torch.Tensor]
    decay: float


class Optimizer(ABC):
    """Base of all: cuts buckets into parts with and without weight decay, and updates one after the other.

    `step` may overwrite gradients.
    """

    kinds: tuple[str, ...] = ("momentum",)
    masked = True  # `step` takes `ok`

    def __init__(self, buckets: Buckets, optim):
        self.buckets, self.optim = buckets, optim
        self.skipped = 0  # steps so far that changed nothing (train.on_bad_step = skip)
        decay = optim.weight_decay if optim.decay_in == "gradient" else 0.0
        self.flats = {kind: [torch.zeros_like(b.weights) for b in buckets.buckets] for kind in self.kinds}
        self.parts: list[Part] = []
        for i, bucket in enumerate(buckets.buckets):
            layout = bucket.layout
            for start, stop, rate in (
                (layout.statistics, layout.decay_end, decay),
                (layout.decay_end, layout.size, 0.0),
            ):
                if stop > start:
                    state = {kind: flats[i][start:stop] for kind, flats in self.flats.items()}
                    self.parts.append(Part(bucket.weights[start:stop], bucket.gradients[start:stop], state, rate))

    @torch.no_grad()
    def step(self, point: Point, previous_lr: float, ok: torch.Tensor | None = None) -> None:
        """Update the weights from the reduced gradients: sums over samples, divided by kn. previous_lr: of the update
        before (0: there was none). ok: a bool scalar on the device, which the host has not read; where it is false
        nothing changes, whatever the gradients hold. None: it is known to be true."""
        for part in self.parts:
            changed = (part.weights, *part.state.values())
            before = [t.clone() for t in changed] if ok is not None else []
            self.update(part, point, previous_lr)
            for now, kept in zip(changed, before, strict=False):  # selected: a factor of 0 would leave NaN
                torch.where(ok, now, kept, out=now)

    @abstractmethod
    def update(self, part: Part, point: Point, previous_lr: float) -> None:
        """`step`, of one part."""

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """By kind, then by parameter name: views, valid as long as the optimizer lives."""
        return {kind: self.buckets.named(flats) for kind, flats in self.flats.items()}

    @torch.no_grad()
    def load(self, content: Mapping[str, Any], where: str) -> None:
        """Put `state()` back. Raises RequestError where it is another optimizer's."""
        for kind, named in self.state().items():
            if kind not in content:
                raise RequestError(f"{where}: no {kind} in it; the checkpoint is of another optimizer")
            for name, value in named.items():
                value.copy_(content[kind][name])

    def synchronise(self, engine, device: torch.device) -> None:
        """Rank 0's state on every rank. Collective."""
        for kind, kept in self.flats.items():
            for i, flat in enumerate(kept):
                engine.broadcast(flat, f"optimizer.{kind}.{i}")


class Sgd(Optimizer):
    """u <- m*u + g; w <- w - lr*u (Goyal et al. 2017, eq. 9); Nesterov: w <- w - lr*(g + m*u). Torch's SGD.

    The buffer does not contain the learning rate, so a learning rate that changes needs no correction (Remark 2).
    Weight decay is added to the gradient (eq. 8), never scaled with the loss (Remark 1).
    """

    def __init__(self, buckets: Buckets, optim):
        super().__init__(buckets, optim)
        self.fused = buckets.device.type == "cuda"  # torch's kernel: 5 passes over memory for 14

    @torch.no_grad()
    def step(self, point: Point, previous_lr: float, ok: torch.Tensor | None = None) -> None:
        if not self.fused:
            return super().step(point, previous_lr, ok)
        refused = None if ok is None else (~ok).float()
        for decay in {part.decay for part in self.parts}:
            alike = [part for part in self.parts if part.decay == decay]
            sgd(
                [part.weights for part in alike],
                [part.gradients for part in alike],
                [part.state["momentum"] for part in alike],
                weight_decay=decay,
                momentum=point.momentum,
                lr=point.lr,
                dampening=0.0,
                nesterov=self.optim.nesterov and point.momentum > 0,
                maximize=False,
                fused=True,
                found_inf=refused,
            )

    def update(self, part: Part, point: Point, previous_lr: float) -> None:
        w, g, state, decay = part
        if decay:
            g.add_(w, alpha=decay)
        if point.momentum:
            u = state["momentum"].mul_(point.momentum).add_(g)
            g = g.add_(u, alpha=point.momentum) if self.optim.nesterov else u
        w.add_(g, alpha=-point.lr)


class AbsorbedSgd(Optimizer):
    """v <- m*(lr/previous lr)*v + lr*g; w <- w - v (Goyal et al. 2017, eq. 10 with Remark 2's correction).

    Nesterov: w <- w - (lr*g + m*v), with the uncorrected m. Equal to `Sgd` at any learning rates above zero; without
    the correction only where the learning rate is constant.
    """

    def update(self, part: Part, point: Point, previous_lr: float) -> None:
        (w, g, state, decay), m = part, point.momentum
        correction = point.lr / previous_lr if self.optim.momentum_correction and previous_lr else 1.0
        if decay:
            g.add_(w, alpha=decay)
        v = state["momentum"].mul_(m * correction).add_(g, alpha=point.lr)
        w.sub_(g.mul_(point.lr).add_(v, alpha=m) if self.optim.nesterov and m else v)


class Adam(Optimizer):
    """Kingma & Ba 2015, algorithm 1, with momentum as beta1 and weight decay in the gradient. Torch's Adam.

    The number of updates that the bias correction needs is that of the steps that were taken.
    """

    kinds = ("momentum", "second")

    def update(self, part: Part, point: Point, previous_lr: float) -> None:
        w, g, state, decay = part
        beta1, beta2, updates = point.momentum, self.optim.beta2, point.step + 1 - self.skipped
        root = (1 - beta2**updates) ** 0.5
        rate = point.lr / (1 - beta1**updates)
        if decay:
            g.add_(w, alpha=decay)
        first = state["momentum"].lerp_(g, 1 - beta1)
        second = state["second"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w.addcdiv_(first, second.sqrt().div_(root).add_(self.optim.epsilon), value=-rate)


class Lars(Optimizer):
    """Layer-wise rates (You et al. 2017): v <- m*v + lr*r*(g + decay*w); w <- w - v, with a layer's
    r = trust * |w| / (|g| + decay*|w|). Parameters without weight decay (BatchNorm, biases) have r = 1. In a tail of
    B' of kn samples, where g is their sum over kn, r takes |g| from their mean.
    """

    def __init__(self, buckets: Buckets, optim):
        super().__init__(buckets, optim)
        self.decay = optim.weight_decay if optim.decay_in == "gradient" else 0.0
        self.in_loss = optim.weight_decay - self.decay  # then it is whole in g, in a tail too
        self.layers = [
            (view.of(bucket.weights), view.of(bucket.gradients))
            for bucket in buckets.buckets
            for view in bucket.layout.views
            if view.offset < bucket.layout.decay_end
        ]

    @torch.no_grad()
    def step(self, point: Point, previous_lr: float, ok: torch.Tensor | None = None) -> None:
        for w, g in self.layers:
            # of the mean over the samples there are: in a tail, absent ones must not make a step longer
            mean = g
            if point.share < 1:
                mean = g.sub(w, alpha=self.in_loss).div_(point.share).add_(w, alpha=self.in_loss)
            weight, gradient = torch.linalg.vector_norm(w), torch.linalg.vector_norm(mean)
            ratio = self.optim.trust * weight / (gradient + self.decay * weight)
            # a layer of zeros, or without gradient, has no ratio: it goes at the plain rate
            ratio = torch.where((weight > 0) & (gradient > 0), ratio, torch.ones_like(ratio))
            g.add_(w, alpha=self.decay).mul_(ratio)
        super().step(point, previous_lr, ok)

    def update(self, part: Part, point: Point, previous_lr: float) -> None:
        w, g, state, _ = part
        w.sub_(state["momentum"].mul_(point.momentum).add_(g, alpha=point.lr))


def create(buckets: Buckets, optim, model: nn.Module | None = None) -> Optimizer | ByParameter:
    """The optimizer of a recipe's `optim` section. model: whose parameters are in the buckets, for those not ours."""
    if optim.name not in OPTIMIZERS:
        assert model is not None
        return ByParameter([(n, p) for n, p in model.named_parameters() if p.requires_grad], optim)
    if optim.name == "sgd":
        return (Sgd if optim.form == "u" else AbsorbedSgd)(buckets, optim)
    return {"adam": Adam, "lars": Lars}[optim.name](buckets, optim)


class Average:
    """Exponential moving average of what a step changes: a <- d*a + (1-d)*x after each.

    tensors: weights and BatchNorm's running statistics; averaged weights want statistics of their own kind.
    """

    def __init__(self, tensors: list[torch.Tensor], decay: float):
        self.tensors, self.decay = tensors, decay
        self.flats = [t.clone() for t in tensors]

    @torch.no_grad()
    def update(self, ok: torch.Tensor | None = None) -> None:
        """ok: as for `Optimizer.step`."""
        for average, tensor in zip(self.flats, self.tensors, strict=True):
            if ok is None:
                average.lerp_(tensor, 1 - self.decay)
            else:
                torch.where(ok, average.lerp(tensor, 1 - self.decay), average, out=average)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange them and their averages: once before an evaluation of the average, once after."""
        for i, tensor in enumerate(self.tensors):
            kept = tensor.clone()
            tensor.copy_(self.flats[i])
            self.flats[i].copy_(kept)
