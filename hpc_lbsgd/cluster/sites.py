"""A site: what a cluster needs said, in one validated file."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from hpc_lbsgd import yaml12
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.launchers import FLAVOURS
from hpc_lbsgd.reading import names_in, validated
from hpc_lbsgd.recipe import STAGE_DIR, expanded
from hpc_lbsgd.schedulers.known import SCHEDULERS
from hpc_lbsgd.schedulers.scheduler import Scheduler
from hpc_lbsgd.sections import Count, Section

# Values that become directives: one word, nothing that a batch system or a shell would read as more
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@+-]*$")]
WORD = r"[A-Za-z0-9_.,:@+&|*%()\[\]/<>=!-]+"
Option = Annotated[str, Field(pattern=rf"^(--[a-z][a-z-]*(={WORD})?|-[A-Za-z]+( {WORD})?)$")]
GPUs = Annotated[str, Field(pattern=r"^([A-Za-z0-9_.-]+:)?\d+$")]
Interface = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# Words that are quoted where they are used; a newline would still break the line of a log or a Slurm option
Words = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]+$")]
Flavour = Literal[tuple(FLAVOURS)]
DURATION = r"(\d+|\d+:\d{2}|(\d+-)?\d{1,2}:\d{2}:\d{2}|\d+-\d{1,2}(:\d{2})?)"
Duration = Annotated[str, Field(pattern=f"^{DURATION}$")]


def check_duration(key: str, text: str) -> None:
    if not re.fullmatch(DURATION, text, re.ASCII):
        raise RequestError(f"{key} = {text!r}: expected a time as Slurm writes it, such as 24:00:00 or 2-12:00:00")


def _as_gpus(value):
    """YAML has numbers, and words with a kind; nothing else is any."""
    if isinstance(value, str) and ":" in value:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"gpus_per_node = {value!r}: input should be a valid integer, or KIND:NUMBER such as a100:4")
    return str(value)


class Container(Section):
    runtime: Literal["apptainer", "singularity", "pyxis"]
    image: Words
    """path of a .sif file; pyxis: path of a .sqsh file, or docker://NAME"""
    mounts: list[Words] = []
    """SOURCE or SOURCE:TARGET"""


class Site(Section):
    scheduler: Literal[tuple(SCHEDULERS)] = "slurm"
    partition: Name | None = None
    """or queue"""
    account: Name | None = None
    qos: Name | None = None
    time_limit: Duration = "24:00:00"
    """of one job, as Slurm writes it: days-hours:minutes:seconds; minutes alone in quotes"""
    warn_s: Annotated[int, Field(ge=1, le=65535)] = 300
    """seconds before the time limit at which a job is asked to stop; a step and a checkpoint must fit in"""
    options: list[Option] = []
    """further options of the command that submits, such as --constraint=h100 or --exclusive; `-l place=excl` of PBS"""
    gpus_per_node: Annotated[GPUs, BeforeValidator(_as_gpus)] = "8"
    """a number, or a kind and a number: a100:4"""
    ranks_per_node: Count | None = None
    """default: one a GPU; must be set where there are none"""
    cores_per_node: Count | None = None
    """cores that a job may have of a node"""
    cores_per_rank: Count | None = None
    """cores that a rank (a GPU) gets: compute, decoding, Horovod's own thread; default: cores_per_node / ranks, rounded
    down, and 1 where neither is said"""
    launcher: Literal["srun", "mpirun", "flux"] = "srun"
    """default: srun with Slurm, flux with Flux, mpirun with others"""
    mpi: Flavour = "openmpi"
    """the MPI that Horovod was built with"""
    srun_mpi: Annotated[str, Field(pattern=r"^(pmix(_v\d)?|pmi2|cray_shasta|none)$")] | None = None
    """how srun wires ranks up (`srun --mpi=list` says what there is); default: pmix for openmpi, pmi2 for others;
    none: for machine.engine torch alone"""
    modules: list[Words] = []
    """loaded in this order"""
    environment: dict[Variable, str] = {}
    """set on all ranks"""
    host_suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$")] = ""
    """launcher mpirun: appended to the scheduler's node names, where another network has other names (-ib); mpirun then
    reaches the nodes by ssh"""
    exclude_interfaces: list[Interface] = []
    """network interfaces that MPI and NCCL must not use, such as docker0"""
    scratch: Words | None = None
    """folder on a file system that all nodes see, in which relative run folders lie; its variables (/scratch/$USER) are
    those of the shell that submits"""
    runs: Words = "runs"
    """folder of the run folders; all nodes must see it"""
    stage_dir: Words | None = None
    """node-local folder for copies of packed sets, where the recipe has no machine.stage_dir, and for the bundle; its
    variables ($SLURM_TMPDIR) are those of each node"""
    bundle: Words | None = None
    """file of `hpc-lbsgd bundle`, which all nodes see: unpacked in stage_dir on each node, once, and ranks start from
    there; its variables are those of the shell that submits"""
    python: Words | None = None
    """of the environment, on the nodes; default: the one that submits, in a container python"""
    preflight_nodes: bool = False
    """a job measures its nodes before its ranks start (`doctor --nodes`, half a minute), and leaves out slow ones"""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """restarts of a job without a new checkpoint, after which it gives up"""
    container: Container | None = None

    @model_validator(mode="before")
    @classmethod
    def _launcher_of_scheduler(cls, content):
        system = SCHEDULERS.get(content.get("scheduler")) if isinstance(content, dict) else None
        return {"launcher": system.launchers[0], **content} if system else content

    @model_validator(mode="after")
    def _fits_together(self):
        if self.launcher not in self.batch.launchers:
            allowed = ", ".join(self.batch.launchers)
            raise ValueError(f"launcher = {self.launcher} with scheduler = {self.scheduler}; allowed: {allowed}")
        for feature, key, value in (
            ("qos", "qos", self.qos),
            ("kinds of GPU", "gpus_per_node", self.gpus_per_node if ":" in self.gpus_per_node else None),
            ("container", "container", self.container and self.container.image),
        ):
            if value:
                self.refuse(feature, f"{key} = {value}")
        if self.preflight_nodes:
            self.refuse("leave nodes out", "preflight_nodes = true")
        if self.bundle:
            self.refuse("bundle", f"bundle = {self.bundle}")
        if self.bundle and self.container:
            raise ValueError(f"bundle = {self.bundle} with container: an image has its own environment")
        if self.bundle and not self.stage_dir:
            raise ValueError(f"bundle = {self.bundle} without stage_dir: say where nodes have a disk of their own")
        if self.preflight_nodes and self.container:
            raise ValueError("preflight_nodes with container: ranks of the check would start outside it")
        if not self.gpus and self.ranks_per_node is None:
            raise ValueError("ranks_per_node is not set, and gpus_per_node = 0: say how many ranks a node has")
        if self.cores_per_node and self.ranks * self.cores > self.cores_per_node:
            raise ValueError(f"{self.ranks} ranks of {self.cores} cores on cores_per_node = {self.cores_per_node}")
        if self.gpus and self.ranks > self.gpus:
            raise ValueError(
                f"ranks_per_node = {self.ranks_per_node} is more than gpus_per_node = {self.gpus_per_node}: "
                "a GPU has one rank"
            )
        if self.container and self.launcher != "srun":
            raise ValueError(f"container with launcher = {self.launcher}; allowed: srun")
        if self.host_suffix and self.launcher != "mpirun":
            raise ValueError(f"host_suffix = {self.host_suffix} with launcher = {self.launcher}; allowed: mpirun")
        if self.launcher == "srun" and self.mpi == "openmpi" and self.srun_mpi == "pmi2":
            raise ValueError("srun_mpi = pmi2 with mpi = openmpi; allowed: pmix")
        return self

    def refuse(self, feature: str, what: str) -> None:
        """As Scheduler.refuse, for what a site says."""
        try:
            self.batch.refuse(feature, what)
        except RequestError as problem:
            raise ValueError(str(problem)) from None

    @property
    def batch(self) -> Scheduler:
        return SCHEDULERS[self.scheduler]

    @property
    def ranks(self) -> int:
        """Ranks a node."""
        return self.ranks_per_node or self.gpus

    @property
    def gpus(self) -> int:
        """GPUs a node."""
        return int(self.gpus_per_node.rpartition(":")[2])

    @property
    def cores(self) -> int:
        """Cores a rank."""
        return self.cores_per_rank or max(1, (self.cores_per_node or 0) // self.ranks)

    @property
    def wire_up(self) -> str:
        return self.srun_mpi or FLAVOURS[self.mpi].srun_mpi

    def folder_of_run(self, run: str) -> str:
        """A run folder, under scratch where it is relative. Raises RequestError for a variable that is not set."""
        if self.scratch is None:
            return run
        return str(Path(expanded(self.scratch, "scratch")) / run)

    @property
    def bundle_file(self) -> str:
        """For all nodes. Raises RequestError for a variable that is not set."""
        return str(Path(expanded(self.bundle, "bundle")).absolute()) if self.bundle else ""

    def storage(self) -> dict[str, str]:
        """Environment variables that say where nodes keep copies of data; not expanded before they are there."""
        return {STAGE_DIR: self.stage_dir} if self.stage_dir else {}

    def fabric(self) -> dict[str, str]:
        """Environment variables that keep MPI and NCCL off the excluded interfaces."""
        if not self.exclude_interfaces:
            return {}
        names = ",".join(self.exclude_interfaces)
        found = {"NCCL_SOCKET_IFNAME": f"^lo,{names}"}
        if self.mpi == "openmpi":
            # setting these two replaces a default that leaves out the loopback; PRRTE (Open MPI 5) sees to it itself
            for key in ("OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_oob_tcp_if_exclude"):
                found[key] = f"lo,{names}"
            found["PRTE_MCA_prte_if_exclude"] = names
        return found


def shipped() -> list[str]:
    """Names of the sites that come with the package."""
    return names_in(resources.files("hpc_lbsgd.cluster") / "sites")


def read(name: str) -> Site:
    """A site by shipped name or path. Raises RequestError with one message that names key and value."""
    path, where = Path(name), f"site {name}"
    if path.suffix in (".yaml", ".yml"):
        content = yaml12.mapping_of(path, where)
    elif name in shipped():
        text = (resources.files("hpc_lbsgd.cluster") / "sites" / f"{name}.yaml").read_text("utf-8")
        content = yaml12.mapping(text, where)
    else:
        raise RequestError(f"site {name!r}: neither a .yaml file nor a shipped site ({', '.join(shipped())})")
    return validated(Site, content, where)
