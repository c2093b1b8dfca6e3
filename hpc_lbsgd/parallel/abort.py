"""The end of every rank of a job, from any rank and any thread."""

from __future__ import annotations

import os
import threading

ABORT_GRACE_S = 10.0  # MPI_Abort may itself hang in a broken job; then the process ends without it


def end_all_ranks(code: int, by_mpi: bool = True) -> None:
    """MPI_Abort on the world, where this process's engine has started MPI.

    Without MPI this process ends, with `code`: its launcher ends the others (torchrun, srun --kill-on-bad-exit), and
    those that it misses find their connections closed.
    """
    if not by_mpi:
        os._exit(code)
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False  # the engine owns MPI's life
    timer = threading.Timer(ABORT_GRACE_S, os._exit, [code])
    timer.daemon = True
    timer.start()
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(code)
