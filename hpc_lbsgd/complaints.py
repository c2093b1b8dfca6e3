"""What went wrong, in one line, from one rank."""

from __future__ import annotations

import errno
import os
import sys
import time

from hpc_lbsgd import progress
from hpc_lbsgd.errors import EXIT_FAILED, EXIT_REQUEST, RequestError, RunError
from hpc_lbsgd.parallel import world

LATER_S = 10.0
OF_A_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOENT,
             errno.EROFS)  # fmt: skip


def leave_to_rank_0() -> bool:
    """Every rank finds the same fault in a request; rank 0 says so. The others wait until it has: mpirun ends all ranks
    as soon as one ends with a code, and would end a rank 0 that is late before its message."""
    if world.from_environment().rank == 0:
        return False
    time.sleep(LATER_S)
    return True


def complain(problem: RequestError | RunError | OSError) -> int:
    """One line, and the exit code. An OSError of a path that cannot be is one of the request: too long, a file in
    place of a folder, not ours to read."""
    asked = isinstance(problem, RequestError) or getattr(problem, "errno", None) in OF_A_PATH
    if asked and leave_to_rank_0():
        return EXIT_REQUEST
    progress.raised(problem)
    text = str(problem)
    if isinstance(problem, OSError):
        where = problem.filename if problem.filename is not None else "what is written or read"
        text = f"{where}: {problem.strerror or problem} (-v shows where)"
        if problem.errno == errno.ENOSPC and problem.filename is None:  # what is left must not fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            text = "stdout cannot be written: no space left on device"
    print(f"hpc-lbsgd: {text}", file=sys.stderr)
    return EXIT_REQUEST if asked else EXIT_FAILED
