"""Real ranks (processes, sockets, files), forked from one process which has imported everything: a start takes
a second, not six. Nobody ends them but themselves: this launcher only waits, so what ends a job is the product's doing.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hpc_lbsgd.parallel.meeting import free_port
from hpc_lbsgd.parallel.spawn import environments

sys.path.insert(0, str(Path(__file__).parent))


class Job:
    """`hpc-lbsgd WORDS` on forked ranks."""

    def __init__(self, ranks: int, words: list, folder: Path, env: dict[str, str], before=lambda rank: None):
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        self.codes: dict[int, int] = {}
        told = environments(ranks, free_port()) if ranks > 1 else [{}]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [self._fork(rank, told[rank] | env, [str(w) for w in words], before) for rank in range(ranks)]
        self.group = self.pids[0]

    def _fork(self, rank: int, env: dict[str, str], words: list[str], before) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 99
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for target in (1, 2):
                os.dup2(log, target)
            os.environ.update(env, FORKED="1")
            import hurt

            from hpc_lbsgd import cli

            hurt.install()
            before(rank)
            code = cli.main(words)
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 98
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> bool:
        """All have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float, but: int | None = None) -> bool:
        """Whether all (but one rank) have ended within `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.poll() or set(range(len(self.pids))) - self.codes.keys() <= {but}:
                return True
            time.sleep(0.01)
        return False

    def end(self) -> None:
        """Whoever is left."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
        self.wait(10)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""
