"""GPUs that a process should have, and that torch cannot use."""

from __future__ import annotations

import os
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
HIDDEN = ("", "-1", "NoDevFiles")  # how CUDA_VISIBLE_DEVICES says: none


def lost(driver: Path = DRIVER) -> str | None:
    """Where torch sees no GPU: what is wrong, and what to do; None where there is none to be seen, or none is wanted.
    A batch system says in CUDA_VISIBLE_DEVICES what it gave to a job."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given in HIDDEN:
        return None
    built = f"torch {torch.__version__}, built for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs")
    if driver.exists():
        return (
            f"this node has NVIDIA GPUs, and {built}, cannot use them (driver: {driver.read_text().splitlines()[0]}): "
            "ask the job for GPUs, load a newer driver, or install a torch for this one; CUDA_VISIBLE_DEVICES= trains "
            "on the CPU"
        )
    if given is None:
        return None
    return (
        f"a GPU was given to the job (CUDA_VISIBLE_DEVICES={given}), but this node has no NVIDIA driver, and {built}, "
        "finds none: have the node repaired, or leave it out; to train on CPUs ask for none (gpus_per_node: 0 in the "
        "site file, or CUDA_VISIBLE_DEVICES=)"
    )
