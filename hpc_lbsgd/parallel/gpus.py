"""GPUs that a process should have: how many there are without asking torch, and whether torch cannot use them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hpc_lbsgd.schedulers.scheduler import ask

DRIVER = Path("/proc/driver/nvidia/version")
SEEN = re.compile(r"\s*\+?\d|GPU-|MIG-")  # what CUDA_VISIBLE_DEVICES begins with; CUDA takes all else for none


def listed() -> int:
    """GPUs of this node that ranks here would take, as nvidia-smi lists them."""
    found, given = ask("nvidia-smi", "-L", timeout_s=20), os.environ.get("CUDA_VISIBLE_DEVICES")
    count = sum(line.startswith("GPU ") for line in found.stdout.splitlines()) if found and not found.returncode else 0
    if given is None:
        return count
    return min(count, len(given.split(","))) if SEEN.match(given) else 0


def lost(driver: Path = DRIVER) -> str | None:
    """Where torch sees no GPU: what is wrong, and what to do; None where there is none to be seen, or none is wanted.
    A batch system says in CUDA_VISIBLE_DEVICES what it gave to a job."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None and not SEEN.match(given):  # "", -1, none; Slurm's NoDevFiles
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
        "finds none: have the node repaired, or leave it out; to train on CPUs, also where that variable is left over, "
        "set it to nothing: CUDA_VISIBLE_DEVICES= (in a site file: environment: {CUDA_VISIBLE_DEVICES: ''})"
    )
