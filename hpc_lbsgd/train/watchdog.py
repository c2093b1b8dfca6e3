"""Against hangs: a heartbeat file a rank, and a thread a rank that notices when steps stop.

Horovod's own stall check runs on rank 0 inside a loop that waits for every rank, so it cannot see a rank that
stopped. Here each rank's thread beats by itself: a stopped process stops beating, one that waits for another says
in its file where it waits.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from hpc_lbsgd.records import RunFolder

EXEMPT = ("start", "compile", "evaluation", "checkpoint", "end")  # phases that may take long


class Watchdog:
    """Beats every few seconds, and calls `on_stall(message, speaks)` when nothing moved for `timeout_s`: all
    ranks that are alive notice, the first of them speaks."""

    def __init__(
        self, folder: RunFolder, rank: int, size: int, timeout_s: float, on_stall: Callable[[str, bool], None]
    ):
        self.folder, self.rank, self.size, self.timeout_s, self.on_stall = folder, rank, size, timeout_s, on_stall
        self.interval_s = min(5.0, timeout_s / 4)
        self._state = ("start", 0)
        self._progress = time.monotonic()
        self._beat_count = 0
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
            "beat": self._beat_count,
            "time": time.time(),
        }
        temporary = self._path(self.rank).with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(beat))
            os.replace(temporary, self._path(self.rank))
        except OSError as problem:  # a full disk must not end a run that could go on
            print(f"rank {self.rank}: heartbeat not written: {problem}", file=sys.stderr)

    def _run(self) -> None:
        while not self._end.wait(self.interval_s):
            self._beat()
            if self._state[0] not in EXEMPT and time.monotonic() - self._progress > self.timeout_s:
                message, speaks = self.diagnosis()
                if not speaks:
                    time.sleep(2 * self.interval_s)  # let the one that speaks be heard
                self.on_stall(message, speaks)
                return

    def _read(self) -> dict[int, dict]:
        beats = {}
        for rank in range(self.size):
            try:
                beats[rank] = json.loads(self._path(rank).read_text())
            except (OSError, ValueError):
                continue
        return beats

    def diagnosis(self) -> tuple[str, bool]:
        """(message, this rank is the first that is alive). The message names who holds the job up: ranks that no
        longer beat, else those that do not wait for others."""
        first = self._read()
        time.sleep(1.5 * self.interval_s)
        self._beat()
        second = self._read()
        silent = [
            r
            for r in range(self.size)
            if r not in second or (r != self.rank and second[r]["beat"] == first.get(r, {}).get("beat"))
        ]
        if silent:
            stalest, why = silent, "no heartbeat: stopped, swapped out, or its node is gone"
        else:
            oldest = min(b["step"] for b in second.values())
            behind = [r for r, b in second.items() if b["step"] == oldest]
            stalest = [r for r in behind if second[r]["phase"] != "sum"] or behind
            why = f"alive, in phase {second[stalest[0]]['phase']!r} of step {oldest}"
        named = ", ".join(
            f"rank {r} on {second[r]['host'] if r in second else 'unknown host'}"
            f"{' (pid ' + str(second[r]['pid']) + ')' if r in second else ''}"
            for r in stalest[:8]
        )
        more = f" and {len(stalest) - 8} more" if len(stalest) > 8 else ""
        message = (
            f"no step for {self.timeout_s:g} s (machine.stall_timeout_s). Stalest: {named}{more}: {why}. "
            "The job ends here; start it again with --resume"
        )
        return message, self.rank == min(set(range(self.size)) - set(silent))
