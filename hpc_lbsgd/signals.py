"""Ctrl-C and processes that are being started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
