"""Ranks on this machine where no MPI is needed and none is there.

    python -m hpc_lbsgd.parallel.spawn RANKS PROGRAM ...

They get torchrun's variables. Unlike torchrun, it ends with the code of the rank that failed, and passes SIGUSR2 on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

from hpc_lbsgd.parallel.meeting import LOOPBACK, free_port

LOOK_EVERY_S = 0.1
END_GRACE_S = 5.0  # for ranks to end after the first that failed
PR_SET_PDEATHSIG = 1  # prctl(2)


def environments(ranks: int, port: int) -> list[dict[str, str]]:
    """What each rank is told. The last two: where this runs inside of torchrun, its own must not be believed."""
    world = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    world |= {"GROUP_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return [
        world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)
    ]


def end_with_parent() -> None:
    """In a rank, before its program. Where this process is killed, ranks must not train on: the run would be another
    start's by then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait(processes: list[subprocess.Popen]) -> int:
    """0 when all have ended with 0; else the first failure's code, once the others are ended too."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed:
            break
        if None not in codes:
            return 0
        time.sleep(LOOK_EVERY_S)
    end(processes)
    first = min(failed)  # a signal is negative: those that lost a killed rank fail right after it
    if first > 0:
        return first
    rank = codes.index(first)
    print(f"spawn: rank {rank} was ended by {signal.Signals(-first).name}", file=sys.stderr, flush=True)
    return 128 - first


def end(processes: list[subprocess.Popen]) -> None:
    """End what is still there: a rank takes SIGTERM as a wish to stop after a step that may never end."""
    until = time.monotonic() + END_GRACE_S
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def spawn(ranks: int, program: list[str]) -> int:
    """Run `program` on so many ranks to its end; returns the job's exit code."""
    processes = [
        # a session each: Ctrl-C at a terminal reaches this process alone
        subprocess.Popen(program, env=os.environ | own, start_new_session=True, preexec_fn=end_with_parent)
        for own in environments(ranks, free_port())
    ]

    def ask(number, frame):
        for process in processes:
            process.send_signal(signal.SIGUSR2)

    def leave(number, frame):
        end(processes)
        sys.exit(128 + number)

    for number, act in ((signal.SIGUSR2, ask), (signal.SIGINT, ask), (signal.SIGTERM, leave)):
        signal.signal(number, act)
    return wait(processes)


if __name__ == "__main__":
    sys.exit(spawn(int(sys.argv[1]), sys.argv[2:]))
