"""Stand-ins for PBS, LSF and Flux. None of the three can be installed here, so these are NOT they: programs of the same
names that take what the manuals document, refuse everything else, and run jobs on this machine. What they prove is that
our side of the talk is consistent and follows the documented grammar; not that a real system agrees.

    standins.install(folder, "pbs")        puts qsub, qstat, qdel into folder/bin; jobs are files in folder/jobs

Sources: qsub(1B), qstat(1B), qdel(1B) of OpenPBS; bsub, bjobs, bkill, brequeue of IBM's LSF 10.1 command reference;
flux-batch(1), flux-jobs(1), flux-run(1), flux-job(1), flux-environment(7).
Only the clock is ours: the time before a limit has come when a test says so, by a file.
jobs.py: a job as a file, and its life; pbs.py, lsf.py, flux.py: the commands; __main__.py: what they start
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROGRAMS = {"pbs": ("qsub", "qstat", "qdel"), "lsf": ("bsub", "bjobs", "bkill", "brequeue"), "flux": ("flux",)}


# The script of a system that gives no signal keeps time by `sleep`
SLEEP = """\
#!/bin/sh
[ "${#1}" -ge 3 ] || exec /bin/sleep "$@"
while [ ! -e "$STANDIN/late" ]; do /bin/sleep 0.1; done
rm "$STANDIN/late"
"""


def late(folder: Path) -> None:
    """The job at work there is near its limit now: it is warned, once."""
    (folder / "late").touch()


def install(folder: Path, system: str) -> dict[str, str]:
    """The environment in which its programs are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    texts = {
        p: f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent} {system} {p} "$@"\n' for p in PROGRAMS[system]
    }
    for program, text in (texts if system == "lsf" else texts | {"sleep": SLEEP}).items():
        (folder / "bin" / program).write_text(text)
        (folder / "bin" / program).chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "STANDIN": str(folder)}
