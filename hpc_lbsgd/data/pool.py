"""Processes that share work on a data set."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children, get_context

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
