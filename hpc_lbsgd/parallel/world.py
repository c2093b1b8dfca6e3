"""What a rank can know of its world before any engine starts: numbers that the launcher left in the environment."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# launcher, and where it tells (rank, size, local rank, ranks on this node)
_VARIABLES = (
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),  # first: mpirun or srun may start torchrun
    (
        "mpirun",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    ("mpirun", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("srun", ("PMIX_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
)


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int
    local_size: int


def from_environment(env: Mapping[str, str] = os.environ) -> World:
    """The launcher's numbers; one rank alone where there is no launcher."""
    launcher, (rank, size, local_rank, local_size) = _told(env)
    if launcher is None:
        return World(0, 1, 0, 1)
    return World(
        int(env[rank]),
        int(env[size]),
        int(env.get(local_rank, env[rank])),
        tasks_on_node(env.get(local_size, env[size]), int(env.get("SLURM_NODEID", 0))),
    )


def launcher(env: Mapping[str, str] = os.environ) -> str | None:
    """What started this rank: torchrun, mpirun or srun; None where it is alone."""
    return _told(env)[0]


def _told(env: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    # a launcher that tells all four goes first: srun --mpi=pmi2 sets PMI_RANK, but the place on the node elsewhere
    for name, names in sorted(_VARIABLES, key=lambda row: not all(variable in env for variable in row[1])):
        # an interactive Slurm shell has SLURM_PROCID but no step of more than one task
        if all(variable in env for variable in names[: 4 if name == "torchrun" else 2]):
            return name, names
    return None, ("",) * 4


def tasks_on_node(text: str, node: int) -> int:
    """Of Slurm's "8(x3),2" (or a plain number), the tasks of node number `node`; of the last, where there are fewer."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def cores_per_rank(local_size: int) -> int:
    """Cores this rank may use. A launcher that binds ranks has cut the affinity mask already."""
    mine = cores()
    total = os.cpu_count() or mine
    return max(1, mine if mine < total else total // local_size)


def cpu_model() -> str:
    """As Linux names it; else the architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()
