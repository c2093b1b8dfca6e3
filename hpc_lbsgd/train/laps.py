"""What a start takes, part by part: written in the run's `start` record. Imports no torch: it runs before that."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Laps:
    """Seconds of a start's parts, by name, in order; together they are all of it, from the process's own start."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = process_start()

    def end(self, part: str) -> None:
        """`part` has lasted since the part before it ended."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.parts[part] = round(now - self._last, 3)
        self._last = now


def process_start() -> float:
    """When this process began, in seconds since the machine did; now, where nobody can tell (/proc, proc(5))."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextmanager
def kept_for_good() -> Iterator[None]:
    """What is imported here stays to the end. The collector would go through its million objects again and again while
    they come, at every full collection of the run, and at exit: a quarter of what importing torch takes."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
