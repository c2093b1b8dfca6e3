"""What asks a run to stop from outside: signals, and a file in the run folder."""

from __future__ import annotations

import signal
import time

from hpc_lbsgd.records import RunFolder

LOOK_EVERY_S = 1.0  # a look at a parallel file system is not free
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # not USR1, which NCCL may take


class Stops:
    """`asked()` is acted upon at the next step's sum, by all ranks together. Only rank 0 looks for the file."""

    def __init__(self, folder: RunFolder, lead: bool):
        self._folder, self._lead, self._asked = folder, lead, False
        self._looked = time.monotonic()

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def asked(self) -> bool:
        # not every launcher passes signals on to its ranks
        if self._lead and time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._asked = self._asked or self._folder.stop_file.exists()
        return self._asked
