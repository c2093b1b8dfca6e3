"""Commands and ranks of tests are forked from an interpreter that has imported torch and its like.

Those imports are most of what a short job takes, two seconds of a core a process, and the tests start a thousand. A job
is still a process of its own, with its own files, environment and modules of ours; under mpirun it is a rank, and what
mpirun does to it is done to it. What tests hurt, and what they say of imports, they start cold.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import warm_python

SCRIPT = """\
#!/bin/sh
[ "$1" != -m ] && exec "{python}" "$@"
exec "{python}" -S -E "{warm}" "{folder}" "$@"
"""


def python(ranks: int = 1) -> list[str]:
    """The words that `python` stands for in `python -m MODULE` or `python FILE`, on so many ranks."""
    if "COVERAGE_RUN" in os.environ:  # it counts from a process's first line on
        return [sys.executable]
    folder, started = interpreters()
    while len(started) < min(ranks, warm_python.INTERPRETERS):
        started.append(start(folder / str(len(started))))
    return [sys.executable, "-S", "-E", warm_python.__file__, str(folder)]


@functools.cache
def interpreters() -> tuple[Path, list[subprocess.Popen]]:
    """(folder of their sockets, those that were needed so far): one for each of the first ranks, for the order of a set
    is another on each rank, as it is when they are started cold."""
    folder, started = Path(tempfile.mkdtemp(prefix="warm-")), []
    script = folder / "python"
    script.write_text(SCRIPT.format(python=sys.executable, warm=warm_python.__file__, folder=folder))
    script.chmod(0o755)

    @atexit.register
    def end():
        for process in started:
            process.stdin.close()
            process.wait()
        shutil.rmtree(folder)

    return folder, started


def start(address: Path) -> subprocess.Popen:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        words = [sys.executable, "-E", warm_python.__file__, str(listener.fileno())]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()])
