"""PBS Professional and OpenPBS: qsub(1B), qstat(1B), qdel(1B), pbs_resources(7B).

qrerun wants a manager's or operator's privilege, so a job that is to go on submits its successor: see shell/pbs.sh.
"""

from __future__ import annotations

import re
from pathlib import Path

from hpc_lbsgd.schedulers.scheduler import (
    CANCELLED,
    COMPLETED,
    COMPLETING,
    FAILED,
    PENDING,
    RUNNING,
    SUSPENDED,
    Scheduler,
    Seen,
    ask,
    seconds_of,
)

STATES = {"Q": PENDING, "H": PENDING, "W": PENDING, "T": PENDING, "M": PENDING, "R": RUNNING, "B": RUNNING,
          "E": COMPLETING, "S": SUSPENDED, "U": SUSPENDED}  # fmt: skip
KILLED = 256  # an exit status above it: by a signal, as qdel ends a job


class PBS(Scheduler):
    name, title, suffix, sentinel, looks = "pbs", "PBS", "pbs", "#PBS", "qstat"
    version = ("qstat", "--version")
    by_hand = "qsub {}"
    launchers = ("mpirun",)
    leaves = ("PBS_NODEFILE",)
    takes_words = False  # "the script must be the last argument to qsub"

    def directives(self, wanted):
        chunk = {"ncpus": wanted.ranks * wanted.cores, "mpiprocs": wanted.ranks, "ngpus": wanted.gpus}
        words = [f"{key}={value}" for key, value in chunk.items() if value]
        yield f"-N {wanted.name}"
        yield "-S /bin/bash"  # else the user's login shell
        if wanted.queue:
            yield f"-q {wanted.queue}"
        if wanted.account:
            yield f"-A {wanted.account}"
        yield f"-l select={':'.join([str(wanted.nodes), *words])}"
        yield "-l place=scatter"
        yield f"-l walltime={clock(seconds_of(wanted.time))}"
        yield "-j oe"
        yield "-k doe"  # the log as it grows, not a copy at the end
        yield "-r y"
        yield "-V"
        yield from wanted.options

    def output(self, run, label="job", array=False):
        """A folder: there is no pattern for the number, but the default name has it. A colon ends a host's name."""
        return "" if not run or ":" in run else f"{run}/"

    def log_of(self, output, name, number, task=0):
        return Path(output) / f"{number}.OU" if output else Path(f"{name}.o{number.partition('.')[0]}")

    def line(self, script, output, words, after):
        return ["qsub", *(["-o", output] if output else []), *after, script]

    def after(self, starts, numbers):
        return ["-W", f"depend={':'.join([starts, *numbers])}"]

    def cancel(self, numbers):
        return ["qdel", *numbers]

    def look(self, job, timeout_s=30.0):
        """By qstat's text: its JSON is none where a variable of the job's environment has some values."""
        found = ask("qstat", "-x", "-f", job, timeout_s=timeout_s)
        if found is not None and "history" in found.stderr:  # it keeps none
            found = ask("qstat", "-f", job, timeout_s=timeout_s)
        if found is None or (found.returncode and "Unknown Job" not in found.stderr):
            return None
        if found.returncode:
            return []
        jobs = re.split("^Job Id: ", found.stdout, flags=re.M)[1:]
        # the first of a name: the job's variables, with whatever is in them, come late, on lines that begin otherwise
        told = [dict(reversed(re.findall(r"^ {4}([\w.]+) = (.*)$", text, re.M))) for text in jobs]
        return [seen(facts) for facts in told] if all("job_state" in facts for facts in told) else None

    def job_of(self, env):
        return env.get("PBS_JOBID")

    def hosts_of(self, env):
        return list(dict.fromkeys(Path(env["PBS_NODEFILE"]).read_text().split())) if "PBS_NODEFILE" in env else []


def seen(facts: dict[str, str]) -> Seen:
    if facts["job_state"] in STATES:
        limit, used = (facts.get(f"{key}.walltime") for key in ("Resource_List", "resources_used"))
        left = clock(max(0, seconds_of(limit) - seconds_of(used))) if limit and used else ""
        return Seen(STATES[facts["job_state"]], left)
    code = int(facts.get("Exit_status", 1))
    return Seen(COMPLETED if code == 0 else CANCELLED if code < 0 or code > KILLED else FAILED)


def clock(seconds: int) -> str:
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
