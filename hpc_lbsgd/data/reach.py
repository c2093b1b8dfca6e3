"""What it means to ask a store for a part of a file: what may go wrong, and what is asked for again."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from hpc_lbsgd.errors import RunError

T = TypeVar("T")
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # before each new try
AT_START_S = (1.0, 2.0)  # the same, where a person waits
TRIES_WRONG = 2  # beyond the first
TOLD_S = 10.0  # between two lines about it

_lock, _last = threading.Lock(), [-TOLD_S]


class Unreachable(Exception):
    """It may be there later."""


class Wrong(Unreachable):
    """It came, and is not what it should be."""


class Missing(Exception):
    """It is not there, or not for us: stores do not always tell."""


class NoRanges(RunError):
    """Who keeps it sends whole files alone."""

    def __init__(self, name: str):
        super().__init__(f"{name}: asked for a part of it, its server sends all; put it where ranges are served")


class Facts(NamedTuple):
    bytes: int | None
    version: str | None  # an ETag, or what else changes with the content


class Reach(Protocol):
    """Files below an address. Raises the above."""

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file; fewer where it ends."""

    def facts(self, name: str) -> Facts: ...


def patiently(function: Callable[[], T], what: str, waits_s: Sequence[float] | None = None) -> T:
    """function(), again where it raises Unreachable, after each of `waits_s`. In the end RunError; or Wrong, which more
    than a few tries do not mend."""
    waits_s = WAITS_S if waits_s is None else waits_s
    for number, wait_s in enumerate((*waits_s, None)):
        try:
            return function()
        except Unreachable as problem:
            if isinstance(problem, Wrong) and (wait_s is None or number == TRIES_WRONG):
                raise
            if wait_s is None:
                raise RunError(f"{what}: {problem}; tried {len(waits_s) + 1} times in {sum(waits_s):g} s") from None
            tell(f"{what}: {problem}; trying again in {wait_s:g} s")
            time.sleep(wait_s)
    raise AssertionError


def tell(text: str) -> None:
    """A line now and then: when a store fails, it fails for all threads."""
    with _lock:
        if time.monotonic() < _last[0] + TOLD_S:
            return
        _last[0] = time.monotonic()
    print(f"hpc-lbsgd: {text}", file=sys.stderr, flush=True)
