"""What a batch system is to this program: directives of a job, commands, and how it tells a job about itself."""

from __future__ import annotations

import re
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import ClassVar, NamedTuple

from hpc_lbsgd.errors import RequestError

TIMEOUT_S = 30.0
# Words for the state of a job, whatever its system calls it. COMPLETING is not over: its processes may still write
PENDING, RUNNING, SUSPENDED, COMPLETING = "PENDING", "RUNNING", "SUSPENDED", "COMPLETING"
COMPLETED, FAILED, CANCELLED = "COMPLETED", "FAILED", "CANCELLED"
OVER = ("BOOT_FAIL", CANCELLED, COMPLETED, "DEADLINE", FAILED, "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
HIDDEN = "HIDDEN"  # there is such a job, and we are not told

# What a system may lack, and why what needs it is refused there
FEATURES = {
    "elastic": "it starts a job with a fixed number of nodes, and ends it when one is lost",
    "same number": "a job that is queued again has another number, for which no later job waits; submit each stage "
    "with --resume when the one before is done",
    "time-min": "it shortens no limit",
    "deadline": "it knows no time by which a job must be over; give --time",
    "test": "it cannot be asked whether it would take a job; look at --dry-run",
    "qos": "it has none; give what stands for it among options",
    "kinds of GPU": "give the number, and the kind among options",
    "container": "ranks are put into a container by srun",
    "bundle": "nothing but the environment's own mpirun starts a process on each of a job's nodes there",
    "leave nodes out": "a job that is queued again cannot be kept off nodes",
}


@dataclass(frozen=True)
class Wanted:
    """What one job asks for."""

    name: str
    nodes: int  # at most, spare ones included
    ranks: int  # a node
    cores: int  # a rank
    time: str  # limit, as `seconds_of` reads it
    gpus: str = ""  # a node: "8", "a100:4"
    least: int | None = None  # nodes with which it starts; None: all
    outlives_nodes: bool = False
    warn_s: int | None = None  # before the limit its script gets USR2
    queue: str | None = None
    account: str | None = None
    qos: str | None = None
    time_min: str | None = None
    deadline: str | None = None  # "2026-12-24T18:00"
    tasks: int = 0  # of an array; 0: none
    options: Sequence[str] = field(default_factory=list)


class Seen(NamedTuple):
    """A job as its system tells."""

    state: str
    left: str = ""  # time, as the system writes it


def seconds_of(duration: str) -> int:
    """Of a time as Slurm writes it, and sites do: minutes, minutes:seconds, hours:minutes:seconds,
    days-hours[:minutes[:seconds]]."""
    days, dash, rest = duration.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def ask(*words: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess | None:
    """What a system's command says; None where it is not there, or does not answer."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None


class Scheduler(ABC):
    name: ClassVar[str]  # what a site says
    title: ClassVar[str]  # what people call it
    suffix: ClassVar[str]  # of a job's script
    sentinel: ClassVar[str]  # begins a directive
    looks: ClassVar[str]  # the program that tells of a job
    version: ClassVar[tuple[str, ...]]  # says its version
    ping: ClassVar[tuple[str, ...]] = ()  # fails where it does not answer
    by_hand: ClassVar[str]  # how people use it, {} being the script
    launchers: ClassVar[tuple[str, ...]]  # of `launcher` in a site, the default first
    can: ClassVar[frozenset[str]] = frozenset()  # of FEATURES
    arrays: ClassVar[bool] = False  # has them, and can queue a task again under its number; else: a job a value
    warns: ClassVar[bool] = False  # sends a signal before the limit; else the script keeps time itself
    tells_ranks: ClassVar[bool] = False  # a job's variables say how many ranks and cores it has; else: as the site says
    leaves: ClassVar[tuple[str, ...]] = ()  # variables by which launchers find nodes
    test: ClassVar[tuple[str, ...]] = ()  # options with which the command submits nothing, and says whether it would
    exports: ClassVar[tuple[str, ...]] = ()  # lines of a script, so that its environment reaches ranks
    takes_words: ClassVar[bool] = True  # a script has arguments; else they stand in it
    from_stdin: ClassVar[bool] = False  # reads the script there

    def refuse(self, feature: str, what: str) -> None:
        """Raises RequestError where it lacks a feature. what: what was asked for, as it was."""
        if feature not in self.can:
            raise RequestError(f"{what}: not with scheduler = {self.name}: {FEATURES[feature]}")

    def block(self, name: str) -> str:
        """A part of the shell file: what a template asks for by `#@ NAME`."""
        parts = {}
        for file in ("common", self.name):
            text = (resources.files("hpc_lbsgd.schedulers") / "shell" / f"{file}.sh").read_text()
            parts |= dict(re.findall(r"^#@ (\w+)\n(.*?)(?=^#@ |\Z)", text, re.M | re.S))
        return parts[name]

    @abstractmethod
    def directives(self, wanted: Wanted) -> Iterator[str]:
        """Their words, without the sentinel."""

    @abstractmethod
    def output(self, run: str | None, label: str = "job", array: bool = False) -> str:
        """Where a job's log goes, as the command has it: into a run folder, else into the folder of the submission.
        There too where the system would read something into the folder's name."""

    @abstractmethod
    def log_of(self, output: str, name: str, number: str, task: int = 0) -> Path:
        """The file of a job, of an array one of its tasks from 0 on."""

    @abstractmethod
    def line(self, script: str, output: str, words: Sequence[str], after: Sequence[str]) -> list[str]:
        """The command that submits a job. after: options of it, see `after`."""

    @abstractmethod
    def after(self, starts: str, numbers: Sequence[str]) -> list[str]:
        """Options of this command. starts: afterok (the job waits for the end of these ones, well), afterany."""

    def number(self, said: str) -> str:
        """Of what the command said."""
        return said.strip().splitlines()[-1].strip()

    def task(self, number: str, index: int) -> str:
        """A task of an array, from 0 on, as the system calls it."""
        raise NotImplementedError

    @abstractmethod
    def cancel(self, numbers: Sequence[str]) -> list[str]: ...

    @abstractmethod
    def look(self, job: str, timeout_s: float = TIMEOUT_S) -> list[Seen] | None:
        """The job, of an array its tasks; [] where the system does not know it any more, None where it does not
        answer."""

    @abstractmethod
    def job_of(self, env: Mapping[str, str]) -> str | None:
        """The job of this process; of an array the very task."""

    def cluster_of(self, env: Mapping[str, str]) -> str | None:
        """Where a number may be another cluster's too."""
        return None

    def cluster_here(self) -> str | None:
        return None

    def restart_of(self, env: Mapping[str, str]) -> int:
        """How often this job was queued again, where the system tells."""
        return 0

    def hosts_of(self, env: Mapping[str, str]) -> list[str]:
        """Nodes of the job of this process."""
        return []

    def host_of(self, env: Mapping[str, str]) -> str | None:
        """This node, as the system calls it; None where it does not tell."""
        return None

    def cores_of(self, env: Mapping[str, str]) -> int | None:
        """Cores that a rank was promised, where the system tells."""
        return None

    def many_nodes(self, env: Mapping[str, str]) -> bool:
        """Whether the job of this process may have other nodes, which a launcher finds by itself."""
        return any(name in env for name in self.leaves)
