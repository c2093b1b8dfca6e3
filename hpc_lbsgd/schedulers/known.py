"""The batch systems there are, and the one that this process is a job of."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hpc_lbsgd.schedulers.flux import Flux
from hpc_lbsgd.schedulers.lsf import LSF
from hpc_lbsgd.schedulers.pbs import PBS
from hpc_lbsgd.schedulers.scheduler import Scheduler
from hpc_lbsgd.schedulers.slurm import Slurm

SCHEDULERS: dict[str, Scheduler] = {s.name: s for s in (Slurm(), PBS(), LSF(), Flux())}
INNERMOST_FIRST = ("flux", "slurm", "pbs", "lsf")  # an instance of Flux may be a job of another
COBALT = "COBALT_NODEFILE"  # known by what it leaves, and nothing else of it


def scheduler(name: str | None) -> Scheduler:
    """None: as before there were others."""
    return SCHEDULERS[name or "slurm"]


def of(env: Mapping[str, str] = os.environ) -> Scheduler | None:
    """Whose job this process is; None where it is none's."""
    return next((s for s in map(scheduler, INNERMOST_FIRST) if s.job_of(env)), None)


def many_nodes(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher may find other nodes here by itself."""
    return COBALT in env or any(s.many_nodes(env) for s in SCHEDULERS.values())


def cores(env: Mapping[str, str] = os.environ) -> int | None:
    """Cores that a rank was promised."""
    return next((number for s in SCHEDULERS.values() if (number := s.cores_of(env))), None)


def hosts(env: Mapping[str, str] = os.environ) -> list[str]:
    """Nodes of the job of this process; none outside a job."""
    found = of(env)
    return found.hosts_of(env) if found else []


def host(env: Mapping[str, str] = os.environ) -> str | None:
    """This node, as its batch system calls it."""
    return next((name for s in SCHEDULERS.values() if (name := s.host_of(env))), None)
