"""Real ranks (processes, sockets, files), forked from one process which has imported everything: a start takes
a second, not six. Nobody ends them but themselves: this launcher only waits, so what ends a job is the product's doing.
"""

from __future__ import annotations

import os
import pty
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import spaces

from hpc_lbsgd.parallel.meeting import free_port
from hpc_lbsgd.parallel.spawn import environments

sys.path.insert(0, str(Path(__file__).parent))
TOKEN = "FAULTS_JOB"  # in the environment of all that a job starts
jobs: list[Job] = []  # that were not ended yet


class Job:
    """`hpc-lbsgd WORDS` on forked ranks. before(rank): called in each first. terminal: one in the foreground of a
    terminal of its own. own_shm: with a /dev/shm of its own."""

    def __init__(
        self,
        ranks: int,
        words: list,
        folder: Path,
        env: dict[str, str],
        before: Callable[[int], None] = lambda rank: None,
        terminal: bool = False,
        own_shm: bool = False,
    ):
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        self.codes: dict[int, int] = {}
        self.token, self.terminal, self._shown = secrets.token_hex(8), -1, ""
        told = environments(ranks, free_port()) if ranks > 1 else [{}]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = []
        jobs.append(self)
        for rank in range(ranks):
            act = self._act(rank, told[rank] | env | {TOKEN: self.token}, [str(w) for w in words], before, own_shm)
            self.pids.append(self._fork(act, terminal))

    def _fork(self, act: Callable[[], int], terminal: bool) -> int:
        if terminal:
            pid, self.terminal = pty.fork()
        else:
            pid = os.fork()
        if pid:
            if terminal:
                os.set_blocking(self.terminal, False)
            return pid
        code = 99
        try:
            if not terminal:
                os.setsid()
                log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                for target in (1, 2):
                    os.dup2(log, target)
            sys.stdout, sys.stderr = (os.fdopen(target, "w", buffering=1, closefd=False) for target in (1, 2))
            code = act()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 98
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:  # its terminal was closed
                    continue
            os._exit(code)

    @staticmethod
    def _act(rank: int, env: dict[str, str], words: list[str], before, own_shm: bool) -> Callable[[], int]:
        def act() -> int:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            if own_shm:
                spaces.own_mounts()
                spaces.mount("none", "/dev/shm", "tmpfs")
            os.environ.update(env)
            import hurt

            from hpc_lbsgd import cli

            hurt.install()
            before(rank)
            return cli.main(words)

        return act

    def poll(self) -> bool:
        """All have ended."""
        self._read()
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float, but: int | None = None) -> bool:
        """Whether all (but one rank) have ended within `seconds`."""
        return self.wait_for(lambda: set(range(len(self.pids))) - self.codes.keys() <= {but}, seconds)

    def wait_for(self, is_so: Callable[[], bool], seconds: float) -> bool:
        """Whether it was so within `seconds`, or before all had ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            over = self.poll()
            if is_so():
                return True
            if over:
                return False
            time.sleep(0.01)
        return False

    def left(self) -> list[int]:
        """Processes that it began and that are still there: in a session of its ranks, or with its token."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                    mine = int(session) in self.pids or self.token.encode() in (entry / "environ").read_bytes()
                except OSError:
                    continue
                if mine and state not in "ZX":
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        """Whoever is left."""
        for pid in self.left() if len(self.codes) < len(self.pids) else ():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.wait(10)
        self.hang_up()
        if self in jobs:
            jobs.remove(self)

    # ---------------------------------------------------------------- what it shows, and its terminal

    def _read(self) -> None:
        while self.terminal >= 0:
            try:
                data = os.read(self.terminal, 65536)
            except OSError:  # nothing yet, or nobody any more
                return
            if not data:
                return
            self._shown += data.decode(errors="replace")

    @property
    def said(self) -> str:
        return self._shown + (self.log.read_text(errors="replace") if self.log.exists() else "")

    def type(self, text: bytes) -> None:
        os.write(self.terminal, text)

    def hang_up(self) -> None:
        """Close the terminal."""
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1


def end_all() -> None:
    """What an interrupted row leaves."""
    for job in list(jobs):
        job.end()
