"""What a rank can know of its world before MPI starts: numbers that the launcher left in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

# (rank, size, local rank, ranks on this node), by launcher
_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int
    local_size: int


def from_environment(env: Mapping[str, str] = os.environ) -> World:
    """The launcher's numbers; one rank alone where there is no launcher."""
    # a launcher that tells all four goes first: srun --mpi=pmi2 sets PMI_RANK, but the place on the node elsewhere
    told = sorted(_VARIABLES, key=lambda names: not all(name in env for name in names))
    for rank, size, local_rank, local_size in told:
        # an interactive Slurm shell has SLURM_PROCID but no step of more than one task
        if rank in env and size in env:
            return World(
                int(env[rank]),
                int(env[size]),
                int(env.get(local_rank, env[rank])),
                tasks_on_node(env.get(local_size, env[size]), int(env.get("SLURM_NODEID", 0))),
            )
    return World(0, 1, 0, 1)


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
