"""Checkpoints behind the steps: a copy at the step's end, written by a thread while the next steps run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.snapshot import HostCopy, Snapshot


class Saved(NamedTuple):
    step: int
    path: Path
    seconds: float  # of the write
    bytes: int


class Writer:
    """At most one write is under way. A caller finds out how it went by `ended` or `wait`, in its own thread.

    keep: as for `checkpoint.prune`. limit_s: a write that takes longer is stuck: `on_stuck(message)` is called, once,
    from another thread. before: called in the writing thread first (it makes the records durable).
    """

    def __init__(
        self,
        folder: RunFolder,
        keep: int,
        limit_s: float,
        on_stuck: Callable[[str], None],
        before: Callable[[], None] = lambda: None,
    ):
        self.folder, self.keep, self.limit_s, self.on_stuck, self.before = folder, keep, limit_s, on_stuck, before
        self._memory = HostCopy()
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._problem: RunError | None = None

    @property
    def busy(self) -> bool:
        """A write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, replica: Replica, state: checkpoint.State) -> Saved | None:
        """Copy what is to be kept, and begin to write it. Waits for the write before, and returns what `wait` did."""
        last = self.wait()
        snapshot = self._memory.take(replica, state)
        # a daemon: one that is stuck in the kernel must not keep a process that is to end
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()
        return last

    def ended(self) -> Saved | None:
        """The write that has ended since the last call, if one has. Raises what it raised."""
        return None if self.busy else self.wait()

    def wait(self) -> Saved | None:
        """As `ended`, after the end of the write under way. Does not return from one that is stuck."""
        self.join()
        saved, problem = self._saved, self._problem
        self._saved = self._problem = None
        if problem:
            raise problem
        return saved

    def join(self) -> None:
        """Until no write is under way. How it went is still to be asked."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def last_good(self) -> str:
        """About the newest checkpoint, for people, once it is whole."""
        self.join()
        newest = checkpoint.find_newest(self.folder)
        return f"last good checkpoint: {newest[0]}" if newest else "no checkpoint was written yet"

    def _write(self, snapshot: Snapshot) -> None:
        deadline = threading.Timer(self.limit_s, self._say_stuck, (snapshot.state.step,))
        deadline.daemon = True
        deadline.start()
        started = time.perf_counter()
        try:
            self.before()
            path = checkpoint.write(self.folder, snapshot, self.keep)
            size = sum(f.stat().st_size for f in path.iterdir())
            self._saved = Saved(snapshot.state.step, path, time.perf_counter() - started, size)
        except RunError as problem:
            self._problem = problem
        except BaseException as problem:  # a thread's exception reaches nobody by itself
            self._problem = RunError(
                f"checkpoint at step {snapshot.state.step} not written: {type(problem).__name__}: {problem}. The older "
                f"ones are untouched in {self.folder.checkpoints}; start again with --resume"
            )
        finally:
            deadline.cancel()

    def _say_stuck(self, step: int) -> None:
        self.on_stuck(
            f"the checkpoint of step {step} is not written after {self.limit_s:g} s (10 times "
            f"machine.stall_timeout_s): the file system of {self.folder.checkpoints} hangs or is too slow. The older "
            "ones are untouched. The job ends here; start it again with --resume, with a larger "
            "machine.stall_timeout_s if the file system is only slow"
        )
