"""Flux: flux-batch(1), flux-jobs(1), flux-cancel(1), flux-environment(7).

A batch script is the first program of an instance of its own, whose commands know nothing of the one that has the job:
`flux --parent` asks that one. The script has no variable with its number, and hands it on in one of ours. Nothing
queues a job again, so that one that is to go on submits its successor: see shell/flux.sh.
"""

from __future__ import annotations

import os
from pathlib import Path

from hpc_lbsgd.schedulers.scheduler import CANCELLED, Scheduler, Seen, ask, seconds_of

NUMBER = "{{id.dec}}"  # in an output file's name
JOB = "HPC_LBSGD_FLUX_JOB"  # its number, in decimals; this prefix is handed to ranks on other hosts as well


class Flux(Scheduler):
    name, title, suffix, sentinel, looks = "flux", "Flux", "flux", "# flux:", "flux"
    version = ("flux", "version")
    by_hand = "flux batch {}"
    launchers = ("flux", "mpirun")
    leaves = ("FLUX_JOB_ID", JOB)
    can = frozenset({"leave nodes out", "bundle"})

    def directives(self, wanted):
        """A slot a node, with all that the job has of it."""
        yield f"--job-name={wanted.name}"
        if wanted.queue:
            yield f"--queue={wanted.queue}"
        if wanted.account:
            yield f"--setattr=bank={wanted.account}"  # flux-accounting
        yield f"--nodes={wanted.nodes}"
        yield f"--nslots={wanted.nodes}"
        yield f"--cores-per-slot={wanted.ranks * wanted.cores}"
        if wanted.gpus:
            yield f"--gpus-per-slot={wanted.gpus}"
        yield f"--time-limit={seconds_of(wanted.time)}s"
        yield from wanted.options

    def output(self, run, label="job", array=False):
        name = f"{label}-{NUMBER}.log"
        return name if not run or "{{" in run else f"{run}/{name}"

    def log_of(self, output, name, number, task=0):
        return Path(output.replace(NUMBER, number))

    def line(self, script, output, words, after):
        return ["flux", "batch", f"--output={output}", *after, script, *words]

    def after(self, starts, numbers):
        return [f"--dependency={starts}:{number}" for number in numbers]

    def number(self, said):
        """In decimals: the letter that other forms begin with depends on the locale."""
        found = said.split()[-1]
        told = ask("flux", "job", "id", found)
        return told.stdout.strip() if told and not told.returncode else found

    def cancel(self, numbers):
        return ["flux", "cancel", *numbers]

    def look(self, job, timeout_s=30.0):
        outside = ("flux", "--parent") if JOB in os.environ else ("flux",)
        found = ask(
            *outside, "jobs", "--suppress-header", "--format={status} {t_remaining!F}", job, timeout_s=timeout_s
        )
        if found is None:
            return None
        if not found.stdout.strip():  # of an instance that does not know it: it may be another one's
            return None
        state, _, left = found.stdout.strip().partition(" ")
        return [Seen(CANCELLED if state == "CANCELED" else state, left.strip())]

    def job_of(self, env):
        return env.get(JOB)

    def hosts_of(self, env):
        found = ask("flux", "hostlist", "--local", "--expand") if JOB in env else None
        return found.stdout.split() if found else []
