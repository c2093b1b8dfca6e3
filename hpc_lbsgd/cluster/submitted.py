"""A job that was submitted: how it is, its end, its log, its result. After submitit's `Job`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hpc_lbsgd import owner
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.records import RunFolder, read_metrics

UNKNOWN = "UNKNOWN"  # Slurm does not answer


@dataclass(frozen=True)
class SubmittedJob:
    number: str  # Slurm's; of a task of an array, 7_1
    nodes: int  # at most
    run: str | None
    log: Path
    stage: str = ""  # of a chain: "2 of 3"

    def facts(self) -> dict:
        return {"job": self.number, "nodes": self.nodes, "stage": self.stage, "run": self.run, "log": str(self.log)}

    @property
    def state(self) -> str:
        """Slurm's word, such as PENDING, RUNNING or COMPLETED. Of a job that Slurm has forgotten, COMPLETED or FAILED
        by what its run has on record; UNKNOWN where Slurm does not answer."""
        found = owner.slurm("squeue", "--noheader", f"--jobs={self.number}", "--states=all", "--format=%T")
        if found and found.stdout.split():
            return found.stdout.split()[0]
        if found is None or (found.returncode and "Invalid job id" not in found.stderr):
            return UNKNOWN
        done = self.run and (RunFolder(self.run).status() or {}).get("status") == "done"
        return "COMPLETED" if done else "FAILED"

    def wait(self, timeout_s: float | None = None, poll_s: float = 10.0) -> str:
        """The state in which it ended; it may be queued again many times before. Raises TimeoutError after
        `timeout_s`."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while (state := self.state) not in owner.OVER:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"job {self.number} is {state} after {timeout_s:g} s")
            time.sleep(poll_s)
        return state

    def cancel(self) -> None:
        """End it. A job that is to go on later is stopped by a file `stop` in its run folder."""
        found = owner.slurm("scancel", self.number)
        if found is None or found.returncode:
            raise RunError(f"scancel {self.number}: {found.stderr.strip() if found else 'Slurm does not answer'}")

    def result(self, timeout_s: float | None = None, poll_s: float = 10.0) -> dict:
        """Wait for its end; returns {"status": what status.json says, "step": the last record of this kind, "eval": the
        same, ...}, a key a kind of record. Raises RunError for a job that failed, with what its run says about it."""
        state = self.wait(timeout_s, poll_s)
        folder = RunFolder(self.run or ".")
        status = folder.status() or {}
        if state != "COMPLETED" or status.get("status") == "failed":
            raise RunError(
                f"job {self.number} is {state}: {status.get('error', 'no cause on record')}; log: {self.log}"
            )
        return {**{record["kind"]: record for record in read_metrics(folder.metrics)}, "status": status}
