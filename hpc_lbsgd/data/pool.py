"""Processes that share work on a data set."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context

from hpc_lbsgd import progress
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.signals import undisturbed


def listen() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def work(function, arguments: tuple, named: dict):
    """In a worker. SIGTERM unwinds what it is at, so that no half of a file is left; then it ends."""
    try:
        return function(*arguments, **named)
    except SystemExit as end:
        os._exit(end.code)  # the executor would go on with the next piece


class Pool(ProcessPoolExecutor):
    """For the main thread. Ctrl-C is for the process that has the pool. Where that one fails, workers end at once,
    with no word."""

    def __init__(self, processes: int):
        super().__init__(processes, mp_context=get_context("spawn"), initializer=listen)

    def submit(self, function, /, *arguments, **named) -> Future:
        with undisturbed():  # it starts processes
            return super().submit(work, function, arguments, named)

    def __exit__(self, kind, value, trace):
        if kind:
            for process in active_children():
                process.terminate()
        self.shutdown(wait=True, cancel_futures=bool(kind))


def in_order(jobs: Sequence[tuple], total: int, title: str, processes: int | None) -> Iterator[list]:
    """What each job (function, arguments ...) returns, a list, in order; a bar counts their items up to `total`.
    Several jobs are done in processes (default: one a core)."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    with progress.bar(total=total, desc=title, unit="image") as bar:

        def counted(found: list) -> list:
            bar.update(len(found))
            return found

        if processes <= 1:
            yield from (counted(function(*arguments)) for function, *arguments in jobs)
            return
        with Pool(processes) as pool:
            for future in [pool.submit(*job) for job in jobs]:
                try:
                    yield counted(future.result())
                except BrokenProcessPool:
                    raise RunError(
                        f"{title}: a process was killed, or crashed in a decoder; where memory ran out, fewer may do "
                        "(--processes N)"
                    ) from None
