"""A job of a stand-in: a file, and a process that leads its life."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE_S = 3.0  # between the signals that end a job
HOST = socket.gethostname()


class Refused(Exception):
    """What the real program would say, and end with an error."""


# ---------------------------------------------------------------- jobs as files


def home() -> Path:
    return Path(os.environ["STANDIN"])


@contextmanager
def locked():
    with open(home() / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def read(number: str) -> dict:
    try:
        return json.loads((home() / "jobs" / number).read_text())
    except FileNotFoundError:
        raise Refused(f"unknown job {number}") from None


def change(number: str, **facts) -> dict:
    with locked():
        job = read(number) | facts
        new = home() / "jobs" / f".{number}"
        new.write_text(json.dumps(job))
        new.replace(home() / "jobs" / number)
    return job


def submit(script: str, log: str, **job) -> str:
    """log: @ stands for the number."""
    with locked():
        number = str(10 + len(list((home() / "jobs").iterdir())))
        facts = {"number": number, "state": "QUEUED", "exit": None, "asked": "", "begun": None, "cwd": os.getcwd(),
                 "log": log.replace("@", number), "environment": dict(os.environ)}  # fmt: skip
        (home() / "jobs" / f"{number}.script").write_text(script)
        (home() / "jobs" / number).write_text(json.dumps(facts | job))
    with open(home() / "daemon.log", "a") as said:
        subprocess.Popen([sys.executable, Path(__file__).parent, job["system"], "RUN", number], start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=said, stderr=said)  # fmt: skip
    return number


def run(number: str, system) -> None:
    """A job's life, in a process of its own."""
    job = read(number)
    while not all(over(other, job["after"]) for other in job["before"]):
        if read(number)["asked"] or any(never(other, job["after"]) for other in job["before"]):
            change(number, state="ENDED", exit=271)
            return
        time.sleep(0.05)
    while once(number, system) == "requeue":
        change(number, state="QUEUED", asked="")
    change(number, state="ENDED")


def over(number: str, after: str) -> bool:
    job = read(number)
    return job["state"] == "ENDED" and (after == "afterany" or job["exit"] == 0)


def never(number: str, after: str) -> bool:
    job = read(number)
    return job["state"] == "ENDED" and after == "afterok" and job["exit"] != 0


def once(number: str, system) -> str:
    """One run of a job; returns what was asked of it."""
    job = read(number)
    log = Path(job["cwd"]) / job["log"]
    begun = time.time()
    change(number, state="RUNNING", begun=begun)
    with open(log, "a") as out:
        process = subprocess.Popen(["bash", str(home() / "jobs" / f"{number}.script"), *job["words"]], stdout=out,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                                   env=system.environment(job), cwd=system.begins_in(job))  # fmt: skip
    ending, sent, late = [], 0.0, home() / "late"
    while process.poll() is None:
        now, asked = time.time(), read(number)["asked"]
        if job["warn"] and late.exists():
            late.unlink()
            os.killpg(process.pid, signal.Signals[f"SIG{job['warn']}"])  # LSF: all processes of the job
        if not ending and (asked or now > begun + job["limit_s"]):
            change(number, state="ENDING")
            ending = list(system.ends_with)
        if ending and now > sent + GRACE_S:
            sent = now
            os.killpg(process.pid, ending[0])
            ending = ending[1:] or ending
        time.sleep(0.05)
    if read(number)["asked"]:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what is left of it
    change(number, exit=process.returncode if process.returncode >= 0 else 256 - process.returncode)
    return read(number)["asked"]


def matches(option: str, value: str, pattern: str) -> str:
    if not re.fullmatch(pattern, value):
        raise Refused(f"illegal {option} value: {value!r}")
    return value


def options(words: list[str], grammar: dict[str, str], flags: set[str]) -> dict[str, list[str]]:
    """Each option's values; refuses what the grammar does not have."""
    found, words = {}, list(words)
    while words:
        option = words.pop(0)
        if option in flags:
            found[option] = []
        elif option in grammar and words:
            found.setdefault(option, []).append(matches(option, words.pop(0), grammar[option]))
        else:
            raise Refused(f"illegal option {option}")
    return found


class Parser(argparse.ArgumentParser):
    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message):
        raise Refused(message)
