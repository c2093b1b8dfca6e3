"""Services that keep a run's scalars, through their own packages (`train.loggers`). How to reach them is said to them
in their own way (WANDB_MODE, MLFLOW_TRACKING_URI).

Each is told by a process of its own beside rank 0, which reads metrics.jsonl as it grows. So one that is slow, hangs or
dies takes nothing from the steps. It ends when its standard input does, however the rank ends, and by then has told all
that was written down.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

from hpc_lbsgd import progress
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import flatten
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.signals import say
from hpc_lbsgd.tail import Tail
from hpc_lbsgd.train.loggers import EVERY_S, Logger, Loggers

MLFLOW_PARAMS = 100  # it takes so many at once
START_S, END_S = 120.0, 30.0  # a service that takes longer is not there, or no longer


# ---------------------------------------------------------------- beside the rank


class Services:
    """Rank 0's end: a listener that has nothing to do until the run ends."""

    def __init__(self, names: Iterable[str], folder: RunFolder, recipe: dict):
        """Raises RequestError for a service that cannot start; none is left running then."""
        known = folder.read_loggers()
        self.processes = {name: begin(name, folder, recipe, known.get(name)) for name in names}
        until = time.monotonic() + START_S
        try:
            for name, process in self.processes.items():
                known[name] = answer(name, process, until)
                folder.write_loggers(known)
        except BaseException:
            self.close()
            raise

    def __call__(self, record: dict) -> None:
        """They read the file."""

    def close(self) -> None:
        """Let them tell the rest. One that does not end is ended."""
        until = time.monotonic() + END_S
        for process in self.processes.values():
            with suppress(BrokenPipeError):
                process.stdin.close()
        for name, process in self.processes.items():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                end(process)
                say(f"{name} has not taken the rest in {END_S:g} s, and is left out; the run folder has the records")
            process.stdout.close()
        self.processes = {}


def begin(name: str, folder: RunFolder, recipe: dict, known: str | None) -> subprocess.Popen:
    words = [sys.executable, "-m", "hpc_lbsgd.train.services", name, str(folder.path.absolute())]
    # a session of its own: what stops a run is for its rank, and what the package starts can be ended with it
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
    )
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps([recipe, known]) + "\n")
    return process


def answer(name: str, process: subprocess.Popen, until: float) -> str:
    """What the service calls this run. Raises RequestError where it does not begin."""
    ready = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]
    if not ready:
        end(process)
        raise RequestError(f"train.loggers = {name}: no answer in {START_S:g} s")
    problem, theirs = json.loads(process.stdout.readline() or '["its process has ended", null]')
    if problem:
        raise RequestError(f"train.loggers = {name}: {problem}")
    return theirs


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def refuse_missing(names: Iterable[str]) -> None:
    """Raise RequestError for a service whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, which such packages leave behind
            raise RequestError(f"train.loggers = {name}: not installed (pip install {name})")


# ---------------------------------------------------------------- in the process


class Wandb(Logger):
    """Weights & Biases: a run of theirs a run of ours, which a resume goes on with."""

    name = "wandb"

    def __init__(self, folder: RunFolder, recipe: dict, known: str | None, reached: int):
        import wandb

        if progress.quiet():
            os.environ.setdefault("WANDB_SILENT", "true")
        where = {"dir": str(folder.path), "name": folder.path.name}
        self.run = wandb.init(config=recipe, id=known, resume="allow", allow_val_change=True, **where)
        self.theirs, self._reached = self.run.id, reached

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._reached = max(self._reached, step)  # it takes no step that is lower than the last
        self.run.log(values, step=self._reached)

    def text(self, name: str, text: str, step: int | None) -> None:
        self.scalars({name: text}, step or 0)

    def end(self, status: str) -> None:
        self.run.finish(exit_code=1 if status == "failed" else 0)


class Mlflow(Logger):
    """MLflow: a run of theirs a run of ours, which a resume goes on with."""

    name = "mlflow"

    def __init__(self, folder: RunFolder, recipe: dict, known: str | None, reached: int):
        import mlflow

        self.mlflow = mlflow
        self.theirs = mlflow.start_run(run_id=known, run_name=None if known else folder.path.name).info.run_id
        params = [] if known else list(flatten(recipe).items())
        for i in range(0, len(params), MLFLOW_PARAMS):
            mlflow.log_params(dict(params[i : i + MLFLOW_PARAMS]))

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def text(self, name: str, text: str, step: int | None) -> None:
        self.mlflow.set_tag(f"{name}/{step}", text)

    def end(self, status: str) -> None:
        self.mlflow.end_run({"done": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


SERVICES = {service.name: service for service in (Wandb, Mlflow)}


class Untold:
    """Passes on what was not told before the run went back: steps that are taken again are the same ones."""

    def __init__(self, folder: RunFolder, known: str | None):
        self._newest: dict[tuple, int] = {}
        for record in read_metrics(folder.lost) if known else ():
            self._newest[key_of(record)] = max(record.get("step", 0), self.newest(record))

    def newest(self, record: dict) -> int:
        return self._newest.get(key_of(record), -1)

    def reached(self) -> int:
        return max(self._newest.values(), default=0)

    def __call__(self, record: dict) -> bool:
        return record.get("step", 0) > self.newest(record) or record["kind"] == "end"


def key_of(record: dict) -> tuple:
    return record["kind"], record.get("event")


def main(name: str, path: str) -> int:
    """Begin as rank 0 asks, answer [problem, what the service calls this run], and tell it all that is written down
    from now on."""
    parent = os.getppid()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    folder = RunFolder(path)
    recipe, known = json.loads(sys.stdin.readline())
    tail, untold = Tail(folder.metrics), Untold(folder, known)
    for _ in tail():
        pass
    try:
        service = SERVICES[name](folder, recipe, known, untold.reached())
    except Exception as problem:  # whatever a package does where nobody has logged in, or no service answers
        said: list = [f"{type(problem).__name__}: {' '.join(str(problem).split())}", None]
    else:
        said = [None, service.theirs]
    with suppress(BrokenPipeError), answers:
        print(json.dumps(said), file=answers)
    if said[0]:
        return 1
    loggers, ended = Loggers([service]), False
    while not (ended or loggers.status or service.lost):  # a process that the rank has forked may hold its input open
        ended = bool(select.select([0], [], [], EVERY_S)[0]) or os.getppid() != parent
        for record in filter(untold, tail()):
            loggers(record)
    # the rank waits no longer, or is no longer there
    signal.alarm(int(END_S))
    loggers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
