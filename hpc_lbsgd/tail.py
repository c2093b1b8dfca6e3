"""A run's records as they are written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hpc_lbsgd.records import record_of


class Tail:
    """The records of a growing file, each once; from the start again where a resume put another one in its place."""

    def __init__(self, path: Path, again: Callable[[], None] = lambda: None):
        """again: called before the records that come again."""
        self.path, self.again = path, again
        self.place, self.file = 0, None

    def __call__(self) -> Iterator[dict]:
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if self.place and (found.st_ino != self.file or found.st_size < self.place):
                    self.place = 0
                    self.again()
                self.file = found.st_ino
                file.seek(self.place)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self.place += len(line)
                    record = record_of(line)
                    if record is not None:
                        yield record
        except FileNotFoundError:
            return
