"""Processes that share work on a data set."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context


def listen() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def work(function, arguments: tuple, named: dict):
    """In a worker. SIGTERM unwinds what it is at, so that no half of a file is left; then it ends."""
    try:
        return function(*arguments, **named)
    except SystemExit as end:
        os._exit(end.code)  # the executor would go on with the next piece


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until what is here is done, and never reaches processes that are started here."""
    asked: list[tuple] = []
    handler = signal.signal(signal.SIGINT, lambda *what: asked.append(what))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if asked and callable(handler):
        handler(*asked[0])


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
            self.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
        return super().__exit__(kind, value, trace)
