"""IBM Spectrum LSF 10.1: bsub, bjobs, brequeue, bkill, as its command reference has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hpc_lbsgd.schedulers.scheduler import (
    COMPLETED,
    FAILED,
    PENDING,
    RUNNING,
    SUSPENDED,
    Scheduler,
    Seen,
    ask,
    seconds_of,
)

STATES = {"PEND": PENDING, "PSUSP": PENDING, "WAIT": PENDING, "RUN": RUNNING, "USUSP": SUSPENDED, "SSUSP": SUSPENDED,
          "DONE": COMPLETED, "EXIT": FAILED}  # fmt: skip


class LSF(Scheduler):
    name, title, suffix, sentinel, looks = "lsf", "LSF", "lsf", "#BSUB", "bjobs"
    version = ("lsid",)
    by_hand = "bsub < {}"
    launchers = ("mpirun",)
    can = frozenset({"same number", "deadline"})
    arrays = warns = from_stdin = True
    leaves = ("LSB_MCPU_HOSTS", "LSB_DJOB_HOSTFILE")
    takes_words = False

    def directives(self, wanted):
        """A slot is a core, as LSF counts them where nobody has changed it."""
        slots = wanted.ranks * wanted.cores
        yield f'-J "{wanted.name}[1-{wanted.tasks}]"' if wanted.tasks else f"-J {wanted.name}"
        if wanted.queue:
            yield f"-q {wanted.queue}"
        if wanted.account:
            yield f"-P {wanted.account}"
        yield f"-n {wanted.nodes * slots}"
        yield f'-R "span[ptile={slots}]"'
        if wanted.gpus:
            yield f'-gpu "num={wanted.gpus}"'  # a host
        yield f"-W {minutes(seconds_of(wanted.time))}"
        if wanted.warn_s:
            yield "-wa USR2"
            yield f"-wt {minutes(wanted.warn_s)}"
        if wanted.deadline:
            day, _, time = wanted.deadline.partition("T")
            yield f"-t {':'.join([*day.split('-'), *(time or '00:00').split(':')[:2]])}"
        yield "-r"
        yield from wanted.options

    def output(self, run, label="job", array=False):
        name = f"{label}-%J_%I.log" if array else f"{label}-%J.log"
        return name if not run or "%" in run else f"{run}/{name}"

    def log_of(self, output, name, number, task=0):
        return Path(output.replace("%J", number).replace("%I", str(task + 1)))

    def line(self, script, output, words, after):
        return ["bsub", "-o", output, *after]

    def after(self, starts, numbers):
        condition = {"afterok": "done", "afterany": "ended"}[starts]
        return ["-w", " && ".join(f"{condition}({number})" for number in numbers), "-ti"]

    def number(self, said):
        return re.search(r"Job <(\d+)>", said)[1]

    def task(self, number, index):
        return f"{number}[{index + 1}]"

    def cancel(self, numbers):
        return ["bkill", *numbers]

    def look(self, job, timeout_s=30.0):
        found = ask("bjobs", "-o", "stat time_left", "-json", job, timeout_s=timeout_s)
        said = found.stdout + found.stderr if found else ""
        if "is not found" in said:
            return []
        try:
            records = json.loads(found.stdout)["RECORDS"]
        except (AttributeError, ValueError, KeyError):
            return None
        return [Seen(STATES.get(r["STAT"], r["STAT"]), r.get("TIME_LEFT", "").strip("- ")) for r in records]

    def job_of(self, env):
        number, index = env.get("LSB_JOBID"), env.get("LSB_JOBINDEX", "0")
        return number if number is None or index in ("", "0") else f"{number}[{index}]"

    def cluster_of(self, env):
        """Where its configuration lies: a job has no variable with the cluster's name."""
        return env.get("LSF_ENVDIR")

    def hosts_of(self, env):
        file = env.get("LSB_DJOB_HOSTFILE")
        return list(dict.fromkeys(Path(file).read_text().split())) if file else []


def minutes(seconds: int) -> str:
    """Rounded up. As all versions take them: hours are written in several ways."""
    return str(-(-seconds // 60))
