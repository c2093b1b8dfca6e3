"""Who may use a run folder: one owner at a time. Decisions alone; files, processes and batch systems are asked by
owner.py.

An owner is a batch job (a batch script takes the run for its job, with all ranks and restarts of it), or processes:
`launch` and rank 0. It is followed only where it is provably over:

    its job is known to the batch system no more, or has ended
    all its processes are gone from a host that can be looked at: this one
    it is an earlier start of this very job, which the batch system ended before it started this one
    it was not renewed for UNREACHABLE_S, and its processes are where nobody can look
A job is never judged by time: it may wait in the queue for weeks.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from enum import Enum

from hpc_lbsgd.schedulers import known

RENEW_S = 30.0
# Long beside what an owner survives without a renewal: a file server that fails over, a virtual machine that is moved,
# a person who suspended a job for lunch. Who has to wait so long and knows better removes the file.
UNREACHABLE_S = 3600.0


DIGEST = "sha256"  # in the file: of what else is in it


def digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Process:
    """One process for all time: a number that was given again has another start."""

    host: str
    space: str  # where the number means this process: the host's boot and its process namespace
    pid: int
    started: int  # clock ticks since boot


@dataclass(frozen=True)
class Lease:
    """What owner.json holds. owner: the same for all who share the run. token: of this record alone."""

    owner: str
    token: str
    since: str
    host: str
    processes: tuple[Process, ...] = ()  # none: held by the job
    job: str | None = None
    cluster: str | None = None
    restart: int = 0  # of the job
    scheduler: str | None = None  # whose job it is; older files do not say

    @property
    def held_by_job(self) -> bool:
        return not self.processes

    def as_json(self) -> dict:
        """With a digest: a process whose number a disk changed by a bit would be one that is gone."""
        content = asdict(self)
        return {**content, DIGEST: digest_of(content)}

    @classmethod
    def from_json(cls, content: dict) -> Lease:
        """Raises TypeError, KeyError or ValueError for what is none."""
        content = dict(content)
        if content.pop(DIGEST, None) not in (None, digest_of(content)):  # None: of a version that wrote none
            raise ValueError("not what was written")
        known.scheduler(content.get("scheduler"))
        return cls(**{**content, "processes": tuple(Process(**p) for p in content["processes"])})

    def __str__(self) -> str:
        pids = ", ".join(f"process {p.pid} on {p.host}" for p in self.processes)
        title = known.scheduler(self.scheduler).title if self.job else ""
        job = f"{title} job {self.job} (begun on {self.host})" if self.job else ""
        return f"{' of '.join(part for part in (pids, job) if part)} since {self.since}"


@dataclass(frozen=True)
class Facts:
    """What can be found out about an owner. None: nobody knows."""

    alive: tuple[bool | None, ...] = ()  # its processes
    job_there: bool | None = None
    idle_s: float = 0.0  # since it was renewed


class Verdict(Enum):
    TAKE = "nobody has it"
    SHARE = "it is ours"
    FOLLOW = "its owner is provably over"
    REFUSE = "its owner may be at work"


@dataclass(frozen=True)
class Ask:
    """Who wants the folder. owner: handed on by the one that holds it, to what it started."""

    owner: str | None = None
    job: str | None = None
    cluster: str | None = None
    restart: int = 0
    for_job: bool = field(default=False)  # a batch script, for all its job
    scheduler: str | None = None


def judge(lease: Lease | None, ask: Ask, facts: Facts) -> Verdict:
    if lease is None:
        return Verdict.TAKE
    if ask.owner == lease.owner:
        return Verdict.SHARE
    if lease.job and (lease.job, lease.cluster) == (ask.job, ask.cluster):
        if lease.held_by_job and ask.for_job:
            return Verdict.SHARE
        if lease.restart < ask.restart:
            return Verdict.FOLLOW
    elif lease.job and facts.job_there is False and True not in facts.alive:  # a shell may have an old job's number
        return Verdict.FOLLOW
    if lease.held_by_job or True in facts.alive:
        return Verdict.REFUSE
    over = set(facts.alive) == {False} or facts.idle_s > UNREACHABLE_S
    return Verdict.FOLLOW if over else Verdict.REFUSE
