"""Ranks that are slower than the others. A sum over ranks hides who they are: all wait for the last one.

Each rank's own time a sample (its wait for data, forward and backward; not its wait for others) travels beside the sums
in a slot of its own, where adding zeros changes nothing. Times decide nothing about a run, they are only told.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from statistics import median, median_low

import torch

WINDOW = 10  # steps; a rank's time is the median over them, so that one hiccup is none
HELD = 8  # steps that it must last before it is told: with the window, within 20 steps
QUIET = 100  # steps after an end in which the same rank is not told anew: who reads it knows by then
SLOW, OVER = 2.0, 1.5  # times the median rank: from where it is said, below which it has ended
WORTH_S = 0.01  # a step; what is lost by less than this is noise


BEGUN, COMPUTED, WAITING, SUMMED = range(4)


class Clock:
    """Of one step: when it began, this rank's backward ended, it had nothing left but to wait for sums, and they were
    there. On a GPU these are the device's times."""

    def __init__(self, device: torch.device):
        self._on_gpu, self._marks = device.type == "cuda", []

    def mark(self) -> None:
        """The next of the four."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self, first: int, last: int) -> float:
        """Between two of them, after the step's sums were read: the device is there, or all but."""
        if self._on_gpu:
            self._marks[last].synchronize()
            return self._marks[first].elapsed_time(self._marks[last]) / 1000
        return self._marks[last] - self._marks[first]


class SlowRanks:
    """Says once that a rank became slow, and once that it no longer is. Pure."""

    def __init__(self, hosts: Sequence[str]):
        self.hosts = hosts
        self.recent: list[deque[float]] = [deque(maxlen=WINDOW) for _ in hosts]
        self.slow: set[int] = set()
        self._held = [0] * len(hosts)  # steps for which a rank's change has lasted
        self._quiet = [0] * len(hosts)  # steps in which nothing is told of it

    def step(self, own_s: Sequence[float], samples: float) -> Iterator[tuple[str, dict]]:
        """(event, its fields) of what changed with this step. own_s: seconds a sample by rank, 0: it had none.
        samples: of a rank in a step, about."""
        for found, seconds in zip(self.recent, own_s, strict=True):
            if seconds > 0:
                found.append(seconds)
        known = {rank: median(found) for rank, found in enumerate(self.recent) if len(found) == WINDOW}
        if len(known) < 2:
            return
        typical = median_low(known.values())
        for rank, seconds in known.items():
            facts = {"rank": rank, "host": self.hosts[rank], "times": round(seconds / typical, 1)}
            facts |= {"own_s": round(seconds * samples, 4), "median_s": round(typical * samples, 4)}
            worth = (seconds - typical) * samples > WORTH_S
            is_slow = rank in self.slow
            changes = (seconds < OVER * typical or not worth) if is_slow else (seconds > SLOW * typical and worth)
            self._quiet[rank] = max(self._quiet[rank] - 1, 0)
            self._held[rank] = self._held[rank] + 1 if changes and not self._quiet[rank] else 0
            if self._held[rank] < HELD:
                continue
            self._held[rank] = 0
            if is_slow:
                self.slow.remove(rank)
                self._quiet[rank] = QUIET
            else:
                self.slow.add(rank)
            yield "slow-ended" if is_slow else "slow", facts
