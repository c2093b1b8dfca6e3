"""Optimizers over flat buckets: a few long vectors instead of many parameters."""

from __future__ import annotations

import torch
from torch import nn

from hpc_lbsgd.parallel.buckets import Buckets


def no_decay_names(model: nn.Module) -> set[str]:
    """Parameters without weight decay: BatchNorm's gamma and beta, and biases (Goyal et al. 2017, section 5.1;
    Jia et al. 2018 for biases)."""
    return {name for name, p in model.named_parameters() if p.dim() <= 1}


class Sgd:
    """SGD with (Nesterov) momentum, u-form: u <- m*u + g; w <- w - lr*u (Goyal et al. 2017, eq. 9).

    In this form the momentum buffer does not contain the learning rate, so a learning rate that changes needs no
    momentum correction (Remark 2). Weight decay is added to the gradient (eq. 8), never scaled with the loss
    (Remark 1). Agrees with torch.optim.SGD.
    """

    def __init__(self, buckets: Buckets, optim):
        self.buckets, self.nesterov = buckets, optim.nesterov
        self.velocity = [torch.zeros_like(b.weights) for b in buckets.buckets]
        self.parts = []  # (weights, gradients, velocity, weight decay), flat
        for bucket, velocity in zip(buckets.buckets, self.velocity, strict=True):
            layout = bucket.layout
            for start, stop, decay in (
                (layout.statistics, layout.decay_end, optim.weight_decay),
                (layout.decay_end, layout.size, 0.0),
            ):
                if stop > start:
                    part = slice(start, stop)
                    self.parts.append((bucket.weights[part], bucket.gradients[part], velocity[part], decay))

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Update the weights. Gradients are used up: they hold something else afterwards."""
        for w, g, u, decay in self.parts:
            if decay:
                g.add_(w, alpha=decay)
            if momentum:
                u.mul_(momentum).add_(g)
                g = g.add_(u, alpha=momentum) if self.nesterov else u
            w.add_(g, alpha=-lr)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """By kind, then by parameter name: views, valid as long as the optimizer lives."""
        return {"momentum": self.buckets.named(self.velocity)}

    def flats(self) -> list[torch.Tensor]:
        """The state as flat tensors, for broadcasts."""
        return self.velocity
