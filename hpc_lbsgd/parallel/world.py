"""What a rank can know of its world before any engine starts: numbers that the launcher left in the environment."""

from __future__ import annotations

import os
import platform
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int  # of the ranks on this node
    local_size: int
    node: int | None = None  # of the job's nodes; None: the launcher does not tell


class Told(NamedTuple):
    """A launcher, and the variables in which its ranks find their place. Empty: it does not tell. The first `needed`
    of them must be there for the line to count."""

    launcher: str
    needed: int
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""
    node: str = ""
    nodes: str = ""  # how many there are, where it is this that tells of the ranks on one


# From the innermost to the outermost: torchrun is started by mpirun or srun, mpirun inside a batch system's allocation,
# and never the other way round. An outer launcher's variables are inherited, and must not be believed; see `_told`.
TABLE = (
    # docs.pytorch.org/docs/stable/elastic/run.html. All four: clouds set RANK and WORLD_SIZE for whole machines
    Told("torchrun", 4, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    # docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html; IBM's Spectrum MPI too
    Told("mpirun", 2, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
         "OMPI_COMM_WORLD_LOCAL_SIZE"),
    # MVAPICH2's user guide, "mpirun_rsh"
    Told("mpirun_rsh", 2, "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
         "MV2_COMM_WORLD_LOCAL_SIZE"),
    # MPICH's Hydra (tried, 4.0) and Intel MPI, which is made of it. All four: the first two are of many, see the end
    Told("mpiexec", 4, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    # LSF with JSM (Summit): docs.olcf.ornl.gov, "jsrun"
    Told("jsrun", 2, "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK",
         "JSM_NAMESPACE_LOCAL_SIZE"),
    # HPE's PALS, PBS on Cray EX: docs.alcf.anl.gov, "Running jobs"
    Told("mpiexec of PALS", 2, "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", "PALS_NODEID"),
    # Cray's ALPS tells the rank alone: aprun -n 16 -N 8 -e HPC_LBSGD_RANKS=16 -e HPC_LBSGD_RANKS_PER_NODE=8 ...
    Told("aprun", 2, "ALPS_APP_PE", "HPC_LBSGD_RANKS", "", "HPC_LBSGD_RANKS_PER_NODE"),
    # flux-environment(7)
    Told("flux run", 2, "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", nodes="FLUX_JOB_NNODES"),
    # srun(1), "OUTPUT ENVIRONMENT VARIABLES"; with --mpi=pmix MPI's rank is PMIx's. A batch script and salloc's shell
    # have SLURM_PROCID too, but no step of more than one task
    Told("srun", 2, "PMIX_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"),
    Told("srun", 2, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
         "SLURM_NODEID"),
    # whoever speaks PMI and is none of the above; Cray's tells the last two
    Told("PMI", 2, "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)  # fmt: skip


def from_environment(env: Mapping[str, str] = os.environ) -> World:
    """The launcher's numbers; one rank alone where there is no launcher."""
    return _told(env)[1]


def launcher(env: Mapping[str, str] = os.environ) -> str | None:
    """What started this rank, as in TABLE; None where it is alone."""
    return _told(env)[0]


def _told(env: Mapping[str, str]) -> tuple[str | None, World]:
    """Launchers start launchers, and ranks inherit the variables of all. The innermost is believed, except that

    - a line counts only where its numbers fit together (half of it may be left over from another launcher),
    - a world of one rank counts last: it is what an MPI without a launcher (a singleton) and a shell inside an
      allocation leave behind.
    """
    found = [(line.launcher, world) for line in TABLE if (world := _world(line, env))]
    many = [pair for pair in found if pair[1].size > 1]
    return next(iter(many or found), (None, World(0, 1, 0, 1)))


def _world(line: Told, env: Mapping[str, str]) -> World | None:
    """What the line's variables say; None where they do not say it, or not all of it can be."""
    if any(name not in env for name in line[2 : 2 + line.needed]):
        return None
    try:
        rank, size = int(env[line.rank]), int(env[line.size])
        node = int(env[line.node]) if line.node in env else None
        even = -(-size // int(env.get(line.nodes, 1)))
        local_size = tasks_on_node(env.get(line.local_size, str(even)), node or 0)
        local_rank = int(env.get(line.local_rank, rank % local_size))
    except (ValueError, ZeroDivisionError):
        return None
    fits = 0 <= rank < size and 0 <= local_rank < local_size <= size
    return World(rank, size, local_rank, local_size, node) if fits else None


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


def place() -> tuple[str, list[int]]:
    """For `shares`: this host, and the cores that this process may use."""
    return socket.gethostname(), sorted(os.sched_getaffinity(0))


def shares(places: Sequence[tuple[str, Sequence[int]]]) -> list[Fraction]:
    """Cores that each rank has to itself, by rank; one that n of them may use counts 1/n. places: each rank's `place`.

    No rank can know it alone: a launcher may bind each, or show all of them what the job has, which may be a part of
    the node.
    """
    users = Counter((host, core) for host, mine in places for core in mine)
    return [sum((Fraction(1, users[host, core]) for core in mine), Fraction(0)) for host, mine in places]


def cpu_model() -> str:
    """As Linux names it; else the architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()
