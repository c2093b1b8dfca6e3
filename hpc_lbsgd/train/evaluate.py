"""Evaluation: every sample once, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from hpc_lbsgd.data.source import Loader
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.targets import rows
from hpc_lbsgd.train.metrics import Metric
from hpc_lbsgd.train.replica import Distributed


def requests(samples: int, batch: int, rank: int, size: int) -> Iterator[Request]:
    """Batch b of `batch` samples is rank b mod size's; the last may be short."""
    for start in range(rank * batch, samples, size * batch):
        yield Request(0, np.arange(start, min(start + batch, samples)))


def evaluate(
    replica: Distributed,
    loader: Loader,
    samples: int,
    batch: int,
    metrics: Mapping[str, Metric],
    waits: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Means of metrics by name over all samples, with accuracy, equal on all ranks. Accuracy is None where labels are
    no classes; a metric that counted nothing, too.

    waits: called when this rank has done its part, and waits for the others. Running statistics are the same on all
    ranks at every step, so there is nothing to gather first.
    """
    engine, model = replica.engine, replica.model
    # right answers, samples, classified; then a slot a batch for each metric's sum, and one for its count: x + 0 is
    # exact, in any order
    batches_in_all = -(-samples // batch)
    sums = torch.zeros(3, dtype=torch.float64, device=replica.device)
    slots = torch.zeros(2 * len(metrics), batches_in_all, dtype=torch.float64, device=replica.device)
    model.eval()
    with torch.no_grad():
        mine = range(engine.rank, batches_in_all, engine.size)
        batches = loader.batches(requests(samples, batch, engine.rank, engine.size))
        for number, (inputs, labels, _) in zip(mine, batches, strict=True):
            outputs = replica.outputs(inputs)
            for i, metric in enumerate(metrics.values()):
                slots[2 * i, number], slots[2 * i + 1, number] = metric(outputs, labels)
            if scores(outputs, labels):
                sums[0] += (outputs.argmax(1) == labels).sum()
                sums[2] += len(labels)
            sums[1] += rows(labels)
    waits()
    flat = torch.cat([sums, slots.flatten()])
    engine.wait(engine.start_sum(flat, "evaluation"))
    (right, count, classified), parts = flat[:3].tolist(), flat[3:].view_as(slots).tolist()
    if round(count) != samples:
        raise RuntimeError(f"evaluation counted {count:.0f} of {samples} samples")
    means = {name: total(values) / total(counts) if total(counts) else None
             for name, values, counts in zip(metrics, parts[::2], parts[1::2], strict=True)}  # fmt: skip
    return {**means, "accuracy": right / samples if classified else None, "samples": samples}


def total(values: list[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


def scores(outputs, labels) -> bool:
    """Outputs are a number a class, and labels say which it is; where there is one output, nothing is classified."""
    tensors = isinstance(outputs, torch.Tensor) and isinstance(labels, torch.Tensor)
    return (
        tensors and outputs.dim() == 2 and outputs.shape[1] > 1 and labels.dim() == 1 and not labels.is_floating_point()
    )
