"""When a checkpoint is due by the clock: `checkpoint.minutes`, fixed or from what checkpoints cost here."""

from __future__ import annotations

from statistics import median

from hpc_lbsgd.sections import Checkpoint
from hpc_lbsgd.theory.interval import checkpoint_interval_s, job_mtbf_s

REMEMBERED = 5  # stalls; their median passes over the first one, which makes the memory


class Interval:
    """For rank 0, whose clock decides. nodes: of the job."""

    def __init__(self, section: Checkpoint, nodes: int = 1):
        self.section, self.nodes = section, nodes
        self._stalls: list[float] = []

    def measured(self, stall_s: float) -> None:
        """A checkpoint held the steps up for so long."""
        self._stalls = [*self._stalls, stall_s][-REMEMBERED:]

    def seconds(self) -> float | None:
        """Between two checkpoints; None: the clock has no say."""
        minutes = self.section.minutes
        if minutes == "auto":
            if not self._stalls:
                return 0.0  # the first one measures, and finds out whether the folder takes it
            return checkpoint_interval_s(median(self._stalls), job_mtbf_s(self.section.mtbf_hours, self.nodes))
        return None if minutes is None else 60 * minutes

    def due(self, since_s: float, busy: bool) -> bool:
        """since_s: since the last one. busy: it is still being written, and `auto` never waits for that."""
        seconds = self.seconds()
        return seconds is not None and since_s > seconds and not (busy and self.section.minutes == "auto")
