"""What asks a run to stop from outside: signals, and a file in the run folder."""

from __future__ import annotations

import os
import signal
import time

from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.signals import ASKED, STOPS, say

SPARE_NODES = "HPC_LBSGD_SPARE_NODES"  # from a batch script: how many it has
LOOK_EVERY_S = 1.0  # a look at a parallel file system is not free


class Stops:
    """`asked()` is acted upon at the next step's sum, by all ranks together. Only rank 0 looks for the file.

    alone: this process is the job, and a person may be at its terminal. Then Ctrl-C ends what comes before the first
    step at once, as KeyboardInterrupt; so does a second one.
    """

    def __init__(self, alone: bool):
        self._alone, self._asked = alone, False
        self._folder: RunFolder | None = None  # where a stop is acted upon
        self._looked = 0.0

    def listen(self) -> None:
        """As early as can be: a signal that finds nobody ends the process."""
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)

    def watch(self, folder: RunFolder, lead: bool) -> None:
        """The run has come so far that it can stop safely."""
        self._folder, self._lead, self._looked = folder, lead, time.monotonic()

    def _on_signal(self, number: int, frame) -> None:
        if number == signal.SIGINT and (self._asked or (self._alone and not self._folder)):
            raise KeyboardInterrupt
        first, self._asked = not self._asked, True  # before it is said: who reads it may be quick
        if self._alone and first:
            say(ASKED)

    def ask(self) -> None:
        """From this process: a callback."""
        self._asked = True

    def asked(self) -> bool:
        # not every launcher passes signals on to its ranks
        if self._lead and time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._asked = self._asked or self._folder.stop_file.exists()
        return self._asked

    def for_spare(self) -> None:
        """A node is slow: where the job has a spare one, its script starts the ranks again with that in its place."""
        self._asked = self._asked or int(os.environ.get(SPARE_NODES) or 0) > 0
