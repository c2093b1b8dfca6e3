"""An evaluation of a run's model: every sample once, over all ranks, to the same bits on any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.utils.data import default_collate

from hpc_lbsgd.api.run import Run
from hpc_lbsgd.api.state import said_when_alone
from hpc_lbsgd.data.place import on_device
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.train import evaluate as evaluations
from hpc_lbsgd.train.metrics import summed


class _Samples:
    """Batches of a data set, by numbers of samples."""

    def __init__(self, data: Any, device: torch.device, collate: Callable[[list[Any]], Any]):
        self.data, self.device, self.collate = data, device, collate

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for request in requests:
            found = self.collate([self.data[int(i)] for i in request.samples])
            if not isinstance(found, (tuple, list)) or len(found) != 2:
                what = f"{len(found)} parts" if isinstance(found, (tuple, list)) else type(found).__name__
                raise RequestError(
                    f"lb.evaluate: samples of {type(self.data).__name__} come as {what}, not as (inputs, labels); "
                    "collate=... makes that of them"
                )
            inputs, labels = found
            yield on_device(Batch(inputs, labels), self.device, False)


def evaluate(
    run: Run,
    data: Any,
    metrics: Mapping[str, Callable[[Any, torch.Tensor], Any]],
    *,
    batch: int = 250,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> dict[str, Any]:
    """{name: mean} of metrics over all of `data`, with `accuracy` (None where labels are no classes) and `samples`;
    equal on all ranks. Collective, between steps.

    data       has a length, and gives (input, label) by number
    metrics    functions of (outputs, labels) that return a value a sample, shape (B,), or a sum and a count
    batch      samples in one forward; a constant of the result, whatever the ranks

    Raises RequestError, with the name, for another shape; RunError inside a step.
    """
    if not run.between_steps:
        raise RunError("lb.evaluate: inside a step; evaluate after optimizer.step()")
    if not isinstance(metrics, Mapping) or not callable(getattr(data, "__getitem__", None)):
        raise RequestError(
            f"lb.evaluate(run, {type(data).__name__}, {type(metrics).__name__}): wants a data set, which gives samples "
            "by number (of a DataLoader its dataset), and metrics by name ({} for none)"
        )
    if taken := metrics.keys() & {"accuracy", "samples"}:
        raise RequestError(f"lb.evaluate: {min(taken)} is there already; give the metric another name")
    if batch < 1 or not len(data):
        raise RequestError(f"lb.evaluate(batch={batch}) of {len(data)} samples: at least 1 of both")
    own = {name: summed(metric, f"lb.evaluate: {name}") for name, metric in metrics.items()}
    modes = {module: module.training for module in run.model.modules()}
    alone = ExitStack()
    try:
        loader = _Samples(data, run.world.device, collate)
        with alone:
            waits = partial(alone.enter_context, said_when_alone(run, "lb.evaluate"))
            return evaluations.evaluate(run.replica, loader, len(data), batch, own, waits)
    finally:
        for module, training in modes.items():
            module.training = training
