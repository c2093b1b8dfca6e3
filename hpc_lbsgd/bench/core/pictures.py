"""Synthetic pictures: batches that are there already, so that no loader is timed."""

from __future__ import annotations

import torch

from hpc_lbsgd.data.source import Batch


def noise(
    generator: torch.Generator,
    size: int,
    channels: int,
    image_size: int,
    classes: int,
    channels_last: bool,
    device: torch.device,
) -> Batch:
    """A batch of `size` pictures with labels; `generator` is of the CPU, so that all devices get the same."""
    images = torch.randn(size, channels, image_size, image_size, generator=generator)
    labels = torch.randint(0, classes, (size,), generator=generator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return Batch(images.to(device, memory_format=layout), labels.to(device))
