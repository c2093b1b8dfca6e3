"""Evaluation: every sample once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from hpc_lbsgd.data.source import Loader
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.train.losses import Loss
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.step import exact

LOSS_BITS = 14  # sums over thousands of samples: coarser than a step's loss, and still exact in any order


def requests(samples: int, batch: int, rank: int, size: int) -> Iterator[Request]:
    """Batch b of `batch` samples is rank b mod size's; the last may be short."""
    for start in range(rank * batch, samples, size * batch):
        yield Request(0, np.arange(start, min(start + batch, samples)))


def evaluate(replica: Replica, loader: Loader, samples: int, batch: int, precision: str, loss: Loss) -> dict:
    """Mean loss and accuracy over all samples, equal on all ranks. Accuracy is None where labels are no classes.

    Running statistics are the same on all ranks at every step, so there is nothing to gather first.
    """
    engine, model = replica.engine, replica.model
    sums = torch.zeros(4, dtype=torch.float64, device=replica.device)  # loss, right answers, samples, classified
    model.eval()
    with torch.no_grad():
        for images, labels, _ in loader.batches(requests(samples, batch, engine.rank, engine.size)):
            with torch.autocast(replica.device.type, torch.bfloat16, enabled=precision == "bf16"):
                outputs = model(images.double() if precision == "float64" else images)
            outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
            sums[0] += exact(loss(outputs, labels), LOSS_BITS)
            if labels.dim() == 1 and not labels.is_floating_point() and outputs.dim() == 2:
                sums[1] += (outputs.argmax(1) == labels).sum()
                sums[3] += len(labels)
            sums[2] += len(labels)
    engine.wait(engine.start_sum(sums, "evaluation"))
    total, right, count, classified = sums.tolist()
    if round(count) != samples:
        raise RuntimeError(f"evaluation counted {count:.0f} of {samples} samples")
    return {"loss": total / samples, "accuracy": right / samples if classified else None, "samples": samples}
