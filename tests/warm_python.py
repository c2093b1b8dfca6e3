"""An interpreter that has imported torch and its like, and forks a process for each job that it is asked to do.

warm_python.py DESCRIPTOR                  the interpreter: waits at that socket, ends with its stdin
warm_python.py FOLDER [-m] PROGRAM WORDS   asks it to do what `python [-m] PROGRAM WORDS` does; needs no imports
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys

INTERPRETERS = 3
LAUNCH = ("launch", "resume", "bench", "reproduce")  # commands of ours that start processes of ours: warm ones, too
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ask(folder: str, words: list[str]) -> int:
    """What mpirun or a test has started. Returns the job's exit code, as subprocess has it."""
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect(f"{folder}/{rank % INTERPRETERS}")
        asked = {"words": words, "here": os.getcwd(), "environment": dict(os.environ), "python": f"{folder}/python"}
        request = json.dumps(asked).encode()
        socket.send_fds(warm, [len(request).to_bytes(8, "little")], [0, 1, 2])
        warm.sendall(request)
        replies = warm.makefile("rb")
        job = int(replies.readline())
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: pass_on(job, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        return int(replies.readline() or -signal.SIGKILL)


def pass_on(job: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended meanwhile, and how is on its way
        os.kill(job, number)


def serve(listener: socket.socket) -> dict:
    """Returns in each fork, with what it is asked to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that keep
    while True:
        if 0 in select.select([listener, 0], [], [])[0]:
            os._exit(0)  # the test run is over
        asked = listener.accept()[0]
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return keep(asked)
        asked.close()


def keep(asked: socket.socket) -> dict:
    """Returns in the job's process. This one says how that ended, and ends it with who asked for it."""
    size, files, _, _ = socket.recv_fds(asked, 8, 3)
    request = json.loads(asked.makefile("rb").read(int.from_bytes(size, "little")))
    job = os.fork()
    if job == 0:
        asked.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return request
    for file in (0, *files):
        os.close(file)
    os.setpgid(job, job)
    ended = os.pidfd_open(job)
    asked.sendall(f"{job}\n".encode())
    if ended not in select.select([ended, asked], [], [])[0]:
        os.killpg(job, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    try:
        asked.sendall(f"{code}\n".encode())
    finally:
        os._exit(0)


def become(words: list[str], here: str, environment: dict[str, str], python: str, library: list[str]) -> None:
    """`python WORDS` in this process. python: for LAUNCH. library: the end of the path."""
    import random
    import runpy

    import numpy

    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    random.seed()
    numpy.random.seed()
    os.chdir(here)
    os.environ.clear()
    os.environ.update(environment)
    own = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    as_module = words[0] == "-m"
    first = here if as_module else os.path.dirname(os.path.abspath(words[0]))
    sys.path[:] = [first, *map(os.path.abspath, own), *library]
    sys.argv[:] = words[1:] if as_module else words
    if as_module and set(words[2:3]) & set(LAUNCH):
        sys.executable = python
    if as_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    if not sys.argv[1].isdigit():
        code = ask(sys.argv[1], sys.argv[2:])
        if code < 0:  # it was killed: so is this
            signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
            os.kill(os.getpid(), -code)
        sys.exit(code)
    import PIL.Image  # noqa: F401
    import pyarrow.compute  # noqa: F401
    import pydantic  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import yaml  # noqa: F401

    library = sys.path[1:]
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    become(**request, library=library)


if __name__ == "__main__":
    main()
