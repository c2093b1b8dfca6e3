"""A batch's way to the device: pinned where it is made, copied while the GPU computes, and laid out there.

What is left to the thread that trains is to start a copy. Pageable memory would be copied twice, and waited for.
"""

from __future__ import annotations

import torch

from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.targets import Target, Targets, each, each_tensor


def pinned(batch: Batch, device: torch.device) -> Batch:
    """In the thread that made it: a copy from which a GPU can read by itself. On CPUs the batch as it is."""
    if device.type != "cuda":
        return batch
    torch.cuda.set_device(device)  # each thread has its own, and pinning would open a context on GPU 0
    inputs, labels = (each_tensor(torch.Tensor.pin_memory, part) for part in (batch.inputs, batch.labels))
    return batch._replace(inputs=inputs, labels=labels)


def on_device(batch: Batch, device: torch.device, channels_last: bool = False) -> Batch:
    """The batch on `device`, images (B, C, H, W) channels last there if they should be. Does not wait for the copy:
    what is launched afterwards on the same stream does, and torch keeps pinned memory for as long."""

    def one(given: torch.Tensor) -> torch.Tensor:
        there = given.to(device, non_blocking=True)
        last = channels_last and there.dim() == 4
        return there.contiguous(memory_format=torch.channels_last) if last else there

    return batch._replace(inputs=each_tensor(one, batch.inputs), labels=moved(batch.labels, device))


def moved(targets: Targets, device: torch.device) -> Targets:
    """On `device`, where classes in bytes become the 64 bits that losses want: they travel as an eighth. Bytes that are
    a list, of a length a sample, stay bytes."""

    def one(target: Target) -> Target:
        if isinstance(target, list):
            return [t.to(device, non_blocking=True) for t in target]
        there = target.to(device, non_blocking=True)
        return there.long() if there.dtype == torch.uint8 else there

    return each(one, targets)
