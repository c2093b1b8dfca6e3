"""Evaluation: every sample once, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from hpc_lbsgd.data.source import Loader
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.train.losses import Loss
from hpc_lbsgd.train.replica import Replica


def requests(samples: int, batch: int, rank: int, size: int) -> Iterator[Request]:
    """Batch b of `batch` samples is rank b mod size's; the last may be short."""
    for start in range(rank * batch, samples, size * batch):
        yield Request(0, np.arange(start, min(start + batch, samples)))


def evaluate(
    replica: Replica, loader: Loader, samples: int, batch: int, loss: Loss, waits: Callable[[], None] = lambda: None
) -> dict:
    """Mean loss and accuracy over all samples, equal on all ranks. Accuracy is None where labels are no classes.

    waits: called when this rank has done its part, and waits for the others. Running statistics are the same on all
    ranks at every step, so there is nothing to gather first.
    """
    engine, model = replica.engine, replica.model
    # right answers, samples, classified; then a slot a batch for its loss: x + 0 is exact, in any order
    sums = torch.zeros(3 - (-samples // batch), dtype=torch.float64, device=replica.device)
    model.eval()
    with torch.no_grad():
        mine = range(engine.rank, -(-samples // batch), engine.size)
        batches = loader.batches(requests(samples, batch, engine.rank, engine.size))
        for number, (images, labels, _) in zip(mine, batches, strict=True):
            outputs = replica.outputs(images)
            sums[3 + number] = loss(outputs, labels)
            scores = isinstance(outputs, torch.Tensor) and outputs.dim() == 2
            if scores and labels.dim() == 1 and not labels.is_floating_point():
                sums[0] += (outputs.argmax(1) == labels).sum()
                sums[2] += len(labels)
            sums[1] += len(labels)
    waits()
    engine.wait(engine.start_sum(sums, "evaluation"))
    right, count, classified, *losses = sums.tolist()
    if round(count) != samples:
        raise RuntimeError(f"evaluation counted {count:.0f} of {samples} samples")
    total = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
    return {"loss": total / samples, "accuracy": right / samples if classified else None, "samples": samples}
