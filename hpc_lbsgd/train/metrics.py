"""Metrics of the user's own (`train.metrics`). Each gives a sum and a count a batch of an evaluation, which have slots
of their own there, so that no number of ranks changes a bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hpc_lbsgd.data.targets import Targets, rows
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.imports import load
from hpc_lbsgd.records import EVALUATED
from hpc_lbsgd.train.losses import loss_function

# what records have beside an evaluation that they hold
BESIDE = ("steps", "seconds", "status", "weights_sha256", "run", "averaged", "data")

Metric = Callable[[object, Targets], tuple[torch.Tensor, torch.Tensor | int]]  # of outputs, labels: sum, count


def of_recipe(train) -> dict[str, Metric]:
    """What an evaluation of a recipe's run measures: the loss, without smoothing, and its own metrics."""
    loss = loss_function(train.model_copy(update={"label_smoothing": 0.0}))
    return {"loss": lambda outputs, labels: (loss(outputs, labels), rows(labels)), **load_all(train.metrics)}


def load_all(names: Sequence[str]) -> dict[str, Metric]:
    """By what they are called in records: the function's own name. Raises RequestError where two have one name, or a
    name is taken."""
    found: dict[str, Metric] = {}
    for name in names:
        called = name.partition(":")[2]
        if called in found or called in (*EVALUATED, *BESIDE) or called.startswith("ema_"):
            raise RequestError(f"train.metrics = {name}: records have another {called}; give the function another name")
        found[called] = summed(load(name, "train.metrics"), f"train.metrics = {name}")
    return found


def summed(own: Callable, what: str) -> Metric:
    """A user's function returns a value a sample, shape (B,), or a sum and a count; another shape is refused with
    RequestError, for a mean over a batch would weigh the last batch like the others. what: it is, for the message."""

    def metric(outputs: object, labels: Targets) -> tuple[torch.Tensor, torch.Tensor | int]:
        values = own(outputs, labels)
        if isinstance(values, torch.Tensor) and values.shape == (rows(labels),):
            return values.double().sum(), rows(labels)
        if isinstance(values, tuple) and len(values) == 2:
            total, count = (torch.as_tensor(v) for v in values)
            if total.dim() == count.dim() == 0:
                return total, count
        got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
        raise RequestError(
            f"{what}: returned {got} for {rows(labels)} samples; it must return one value a sample, "
            "shape (B,), or a tuple of a sum and a count"
        )

    return metric
