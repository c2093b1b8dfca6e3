"""Stand-in for Flux: flux batch, jobs, job, cancel, getattr, hostlist, run."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
from pathlib import Path

from jobs import HOST, Parser, Refused, change, home, matches, read, submit


class Flux:
    ends_with = (signal.SIGHUP, signal.SIGKILL)  # the broker makes SIGHUP of SIGTERM
    here = "STANDIN_INSTANCE"  # the job that is the instance that commands refer to

    def flux(self, *words):
        parent = words[0] == "--parent"
        name, *words = words[1:] if parent else words
        if name in ("batch", "cancel", "jobs") and not parent and self.here in os.environ:
            raise Refused(f"{name}: this instance knows no such job: ask its parent")
        getattr(self, name)(*words)

    def batch(self, *words):
        p = Parser()
        for option, kind in (("--job-name", str), ("--queue", str), ("--nodes", int), ("--nslots", int),
                             ("--cores-per-slot", int), ("--gpus-per-slot", int), ("--output", str)):  # fmt: skip
            p.add_argument(option, type=kind)
        p.add_argument("--time-limit")
        p.add_argument("--setattr", action="append")
        p.add_argument("--requires")
        p.add_argument("--dependency", action="append", default=[])
        p.add_argument("script", type=Path)
        p.add_argument("words", nargs=argparse.REMAINDER)
        given = p.parse_args(words)
        text = given.script.read_text()
        a = p.parse_args([*self.directives(text), *words])
        limit = float(matches("--time-limit", a.time_limit, r"\d+(\.\d+)?s").rstrip("s"))
        if (a.nodes, a.nslots) != (1, 1):
            raise Refused("this stand-in has one node")
        before = [matches("--dependency", d, r"(afterok|afterany):\w+").split(":") for d in a.dependency]
        log = (a.output or "flux-{{id.dec}}.out").replace("{{id.dec}}", "@")
        after = before[0][0] if before else "afterany"
        facts = {"limit_s": limit, "ranks": 0, "name": a.job_name, "warn": None, "after": after}
        before = [self.decimal(number) for _, number in before]
        number = submit(text, log, system="flux", words=a.words, before=before, **facts)
        print(f"f{int(number):x}")

    def directives(self, text):
        sentinel, words, closed = None, [], False
        for line in text.splitlines():
            found = re.match(r"(\W*(?:flux|FLUX):)(.*)", line)
            if found and (closed or sentinel not in (None, found[1])):
                raise Refused("directives must be grouped together, with the same sentinel")
            if found:
                sentinel = found[1]
                words += shlex.split(found[2], comments=True)
            closed = closed or bool(sentinel and line.strip() and not line.startswith("#"))
        return words

    def decimal(self, number):
        return str(int(number[1:], 16)) if number.startswith("f") else number

    def job(self, *words):
        what, *rest = words
        if what == "id":
            print(self.decimal(*rest))
        elif (what, rest) == ("killall", ["--force", "--signal=USR2"]):
            if (home() / "deaf").exists():
                raise Refused("flux-job: ERROR: killall: its broker does not answer")
            for file in home().glob(f"jobs/{os.environ[self.here]}.run-*"):
                with contextlib.suppress(ProcessLookupError):  # one that ends at this moment keeps no other from it
                    os.kill(int(file.suffix.removeprefix(".run-")), signal.SIGUSR2)
        else:
            raise Refused(f"flux job {what}")

    def jobs(self, *words):
        p = Parser()
        p.add_argument("--suppress-header", action="store_true", required=True)
        p.add_argument("--format", required=True)
        p.add_argument("job")
        a = p.parse_args(words)
        try:
            job = read(self.decimal(a.job))
        except Refused:
            raise Refused(f"flux-jobs: ERROR: JobID {a.job} unknown") from None
        state = {"QUEUED": "DEPEND", "RUNNING": "RUN", "ENDING": "CLEANUP", "ENDED": "INACTIVE"}[job["state"]]
        result = "CANCELED" if job["asked"] else "FAILED" if job["exit"] else "COMPLETED"
        status = {"DEPEND": "PENDING", "INACTIVE": result}.get(state, "RUNNING")
        left = "8s" if state == "RUN" else ""
        print(a.format.replace("{status}", status).replace("{state}", state).replace("{t_remaining!F}", left))

    def cancel(self, *numbers):
        for number in numbers:
            change(self.decimal(number), asked="cancel")

    def getattr(self, name):
        if name != "jobid" or self.here not in os.environ:
            raise Refused(f"flux-getattr: {name}: no such attribute")
        print(f"f{int(os.environ[self.here]):x}")

    def hostlist(self, *words):
        print(HOST if words[0] == "--local" else words[0])

    def run(self, *words):
        p = Parser()
        for option in ("--nodes", "--ntasks", "--cores-per-task"):
            p.add_argument(option, type=int)
        p.add_argument("--requires")
        p.add_argument("-o", action="append")
        p.add_argument("program", nargs=argparse.REMAINDER)
        a = p.parse_args(words)
        matches("--requires", a.requires or f"hosts:{HOST}", f"hosts:{re.escape(HOST)}")
        from hpc_lbsgd.parallel.launchers import find_mpirun

        (home() / "jobs" / f"{os.environ[self.here]}.run-{os.getpid()}").touch()
        words = [find_mpirun(), "-np", str(a.ntasks), "--oversubscribe", "--bind-to", "none", *a.program]
        os.execv(words[0], words)

    def begins_in(self, job):
        return job["cwd"]

    def environment(self, job):
        """No variable of its own: what it is, is said by attributes."""
        own = {name: value for name, value in job["environment"].items() if not name.startswith("FLUX_")}
        return own | {self.here: job["number"]}
