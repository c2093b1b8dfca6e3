"""Ctrl-C, terminals that are closed, and processes that are being started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
ASKED = "asked to stop: the next step ends with a checkpoint; Ctrl-C again ends at once"
ENDING = "ends when the checkpoint that is being written is whole; Ctrl-C again does not wait for it"


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


def say(text: str) -> None:
    """A line for whoever is still there: a terminal may have been closed, or, where a signal came in the middle of a
    line, be held (RuntimeError: no write inside another)."""
    with suppress(OSError, ValueError, RuntimeError):
        print(f"hpc-lbsgd: {text}", file=sys.stderr, flush=True)


class Steadfast:
    """A stream to a person that never fails: a run outlives its terminal, and the `tee` behind it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
