"""A job that was submitted: how it is, its end, its log, its result. After submitit's `Job`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.owner import OwnerFile
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.schedulers import known
from hpc_lbsgd.schedulers.scheduler import COMPLETED, FAILED, HIDDEN, OVER, ask

UNKNOWN = "UNKNOWN"  # the batch system does not answer


@dataclass(frozen=True)
class SubmittedJob:
    number: str  # the batch system's; of a task of an array in Slurm, 7_1
    nodes: int  # at most
    run: str | None
    log: Path
    scheduler: str
    stage: str = ""  # of a chain: "2 of 3"

    @property
    def now(self) -> str:
        """Its number; where a job that is queued again gets another one, that of the job that has the run now."""
        system = known.scheduler(self.scheduler)
        found = OwnerFile(self.run).read() if self.run and "same number" not in system.can else None
        return found[0].job if found and found[0].held_by_job and found[0].job else self.number

    def facts(self) -> dict:
        return {"job": self.number, "nodes": self.nodes, "stage": self.stage, "run": self.run, "log": str(self.log)}

    @property
    def state(self) -> str:
        """A word of Slurm's, such as PENDING, RUNNING or COMPLETED, whatever the batch system calls it. Of a job that
        is forgotten there, COMPLETED or FAILED by what its run has on record; UNKNOWN where nobody answers."""
        system, number = known.scheduler(self.scheduler), self.now
        found = system.look(number)
        if found is None:
            return UNKNOWN
        renumbered = self.run and number == self.number and "same number" not in system.can  # its successor is over too
        if found and found[0].state != HIDDEN and not (renumbered and found[0].state == COMPLETED):
            return found[0].state
        status = (RunFolder(self.run).status() or {}).get("status") if self.run else None
        return COMPLETED if status == "done" or (found and not self.run) else FAILED

    def wait(self, timeout_s: float | None = None, poll_s: float = 10.0) -> str:
        """The state in which it ended; it may be queued again many times before. Raises TimeoutError after
        `timeout_s`."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while (state := self.state) not in OVER:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"job {self.number} is {state} after {timeout_s:g} s")
            time.sleep(poll_s)
        return state

    def cancel(self) -> None:
        """End it. A job that is to go on later is stopped by a file `stop` in its run folder."""
        system, number = known.scheduler(self.scheduler), self.now
        found = ask(*system.cancel([number]))
        if found is None or found.returncode:
            said = found.stderr.strip() if found else f"{system.title} does not answer"
            raise RunError(f"{system.cancel([number])[0]} {number}: {said}")

    def result(self, timeout_s: float | None = None, poll_s: float = 10.0) -> dict:
        """Wait for its end; returns {"status": what status.json says, "step": the last record of this kind, "eval": the
        same, ...}, a key a kind of record. Raises RunError for a job that failed, with what its run says about it."""
        state = self.wait(timeout_s, poll_s)
        folder = RunFolder(self.run or ".")
        status = folder.status() or {}
        if state != COMPLETED or status.get("status") == "failed":
            raise RunError(
                f"job {self.number} is {state}: {status.get('error', 'no cause on record')}; log: {self.log}"
            )
        return {**{record["kind"]: record for record in read_metrics(folder.metrics)}, "status": status}
