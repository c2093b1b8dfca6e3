"""Stand-ins for PBS, LSF and Flux. None of the three can be installed here, so these are NOT they: programs of the same
names that take what the manuals document, refuse everything else, and run jobs on this machine. What they prove is that
our side of the talk is consistent and follows the documented grammar; not that a real system agrees.

    standins.install(folder, "pbs")        puts qsub, qstat, qdel into folder/bin; jobs are files in folder/jobs

Sources: qsub(1B), qstat(1B), qdel(1B) of OpenPBS; bsub, bjobs, bkill, brequeue of IBM's LSF 10.1 command reference;
flux-batch(1), flux-jobs(1), flux-run(1), flux-job(1), flux-environment(7).
A minute of LSF, which knows no seconds, is a few here (lsf.py).
jobs.py: a job as a file, and its life; pbs.py, lsf.py, flux.py: the commands; __main__.py: what they start
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROGRAMS = {"pbs": ("qsub", "qstat", "qdel"), "lsf": ("bsub", "bjobs", "bkill", "brequeue"), "flux": ("flux",)}


def install(folder: Path, system: str) -> dict[str, str]:
    """The environment in which its programs are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for program in PROGRAMS[system]:
        path = folder / "bin" / program
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent} {system} {program} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "STANDIN": str(folder)}
