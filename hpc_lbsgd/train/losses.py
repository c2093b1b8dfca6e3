"""Losses by name: a function of (outputs, labels) that returns the sum over the samples it got."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hpc_lbsgd.imports import load

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def loss_function(train) -> Loss:
    """The loss of a recipe's `train` section. A user's function returns one loss a sample, shape (B,)."""
    if ":" in train.loss:
        own = load(train.loss, "train.loss")
        return lambda outputs, labels: own(outputs, labels).sum()
    smoothing = train.label_smoothing
    return lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
