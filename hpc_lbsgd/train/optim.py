"""Optimizers over flat buckets: torch's own, fed with a few long vectors instead of many parameters."""

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
    (Remark 1).
    """

    def __init__(self, buckets: Buckets, optim):
        self.buckets = buckets
        self.velocity = [torch.zeros_like(b.weights) for b in buckets.buckets]
        parts = []  # (flat weights with their flat gradient, flat velocity, weight decay)
        for bucket, velocity in zip(buckets.buckets, self.velocity, strict=True):
            layout = bucket.layout
            for start, stop, decay in ((layout.statistics, layout.decay_end, optim.weight_decay),
                                       (layout.decay_end, layout.size, 0.0)):
                if stop > start:
                    flat = nn.Parameter(bucket.weights[start:stop])
                    flat.grad = bucket.gradients[start:stop]
                    parts.append((flat, velocity[start:stop], decay))
        self._torch = torch.optim.SGD([{"params": [flat], "weight_decay": decay} for flat, _, decay in parts],
                                      lr=optim.base_lr, momentum=optim.momentum,
                                      nesterov=optim.nesterov and optim.momentum > 0, fused=True)
        for flat, velocity, _ in parts:
            self._torch.state[flat]["momentum_buffer"] = velocity

    def step(self, lr: float, momentum: float) -> None:
        for group in self._torch.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        self._torch.step()

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """By kind, then by parameter name: views, valid as long as the optimizer lives."""
        return {"momentum": self.buckets.named(self.velocity)}

    def flats(self) -> list[torch.Tensor]:
        """The state as flat tensors, for broadcasts."""
        return self.velocity
