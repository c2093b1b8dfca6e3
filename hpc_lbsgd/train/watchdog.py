"""Against hangs: a heartbeat file a rank, and a thread a rank that notices when steps stop.

Horovod's own stall check runs on rank 0 inside a loop that waits for every rank, so it cannot see a rank that
stopped. Here each rank's thread beats by itself: a stopped process stops beating, one that waits for another says
in its file where it waits.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from hpc_lbsgd.records import RunFolder

# Phases that may take long while every rank beats, in stall timeouts: the ranks that wait for one of them are no stall.
# A thread beats where a write hangs, so a checkpoint has an end of its own.
LONG = {"start": math.inf, "compile": math.inf, "evaluation": math.inf, "closing": math.inf, "checkpoint": 10.0}
OnStall = Callable[[str, bool, list[str]], None]
EXEMPT = "end"  # ranks leave, and need not beat


class Watchdog:
    """Beats every few seconds, and calls `on_stall(message, speaks, hosts)` when nothing moved for `timeout_s`: all
    ranks that are alive notice, the first of them speaks. hosts: those of the stalest ranks, as far as known."""

    def __init__(self, folder: RunFolder, rank: int, size: int, timeout_s: float, on_stall: OnStall):
        self.folder, self.rank, self.size, self.timeout_s, self.on_stall = folder, rank, size, timeout_s, on_stall
        self.interval_s = min(5.0, timeout_s / 4)
        self._state = ("start", 0)
        self._progress = time.monotonic()
        self._beat_count, self._mute = 0, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        folder.heartbeats.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """The trainer is in `phase` ('data', 'sum' or an exempt one) of `step`; any call is progress."""
        self._state = (phase, step)
        self._progress = time.monotonic()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _path(self, rank: int):
        return self.folder.heartbeats / f"rank-{rank:05d}.json"

    def _beat(self) -> None:
        self._beat_count += 1
        phase, step = self._state
        beat = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": phase,
            "step": step,
            "phase_s": round(time.monotonic() - self._progress, 1),
            "beat": self._beat_count,
            "time": time.time(),
        }
        temporary = self._path(self.rank).with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(beat))
            os.replace(temporary, self._path(self.rank))
        except OSError as problem:  # a full disk must not end a run that could go on
            if not self._mute:
                print(f"rank {self.rank}: heartbeat not written: {problem}", file=sys.stderr)
            self._mute = True

    def _beat_for(self, seconds: float) -> None:
        """Wait, and go on beating: other ranks are looking too, and would name this one."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._end.is_set():
            self._beat()
            end += self._wait(min(self.interval_s / 2, left))

    def _wait(self, seconds: float) -> float:
        """Returns the time beside it in which this process was stopped (a suspended job, a laptop's lid): no rank could
        move then, so it counts for nothing."""
        begun = time.monotonic()
        self._end.wait(seconds)
        late_s = time.monotonic() - begun - seconds
        if late_s <= self.interval_s:
            return 0.0
        self._progress = min(self._progress + late_s, time.monotonic())
        return late_s

    def _run(self) -> None:
        while not self._end.is_set():
            self._wait(self.interval_s)
            self._beat()
            since, phase = self._progress, self._state[0]
            if phase == EXEMPT or time.monotonic() - since <= self.timeout_s:
                continue
            # a healthy job may be long in such a phase, and a network file system may show beats a minute late
            silent, beats = self._look(max(self.timeout_s if phase in LONG else 0.0, 2 * self.interval_s))
            if self._end.is_set() or self._progress != since or (not silent and self._takes_long(beats)):
                continue
            speaks = self.rank == min(set(range(self.size)) - set(silent))
            if not speaks:
                self._beat_for(2 * self.interval_s)  # let the one that speaks be heard
            message, hosts = self._diagnosis(silent, beats)
            self.on_stall(message, speaks, hosts)
            return

    def _takes_long(self, beats: dict[int, dict]) -> bool:
        """A rank is in a phase that may take so long, and the others wait for it."""
        return any(b["phase_s"] <= LONG.get(b["phase"], 0.0) * self.timeout_s for b in beats.values())

    def _read(self) -> dict[int, dict]:
        beats = {}
        for rank in range(self.size):
            try:
                beats[rank] = json.loads(self._path(rank).read_text())
            except (OSError, ValueError):
                continue
        return beats

    def _look(self, seconds: float) -> tuple[list[int], dict[int, dict]]:
        """(ranks that did not beat for so long, the last beats of all)."""
        first = self._read()
        self._beat_for(seconds)
        second = self._read()
        # a rank that never wrote has no beat in either; a file that cannot be read just once says nothing
        others = (r for r in range(self.size) if r != self.rank)
        silent = [r for r in others if second.get(r, {}).get("beat") == first.get(r, {}).get("beat")]
        return silent, second

    def _diagnosis(self, silent: list[int], beats: dict[int, dict]) -> tuple[str, list[str]]:
        """Who holds the job up, in words and by host: ranks that no longer beat, else those that do not wait."""
        waited_s = self.timeout_s
        if silent:
            stalest, why = silent, "no heartbeat: stopped, swapped out, or its node is gone"
        else:
            oldest = min(b["step"] for b in beats.values())
            behind = [r for r, b in beats.items() if b["step"] == oldest]
            stalest = [r for r in behind if beats[r]["phase"] != "sum"] or behind
            waited_s *= LONG.get(beats[stalest[0]]["phase"], 1.0)
            why = f"alive, in phase {beats[stalest[0]]['phase']!r} of step {oldest}"
            if all(beats[r]["phase"] == "sum" for r in stalest):
                why += ", for one another: the network between them, or the library that sums, does not go on"
        named = ", ".join(
            f"rank {r} on {beats[r]['host'] if r in beats else 'unknown host'}"
            f"{' (pid ' + str(beats[r]['pid']) + ')' if r in beats else ''}"
            for r in stalest[:8]
        )
        more = f" and {len(stalest) - 8} more" if len(stalest) > 8 else ""
        message = (
            f"no step for {waited_s:g} s (machine.stall_timeout_s). Stalest: {named}{more}: {why}. "
            "The job ends here; start it again with --resume"
        )
        return message, sorted({beats[r]["host"] for r in stalest if r in beats})
