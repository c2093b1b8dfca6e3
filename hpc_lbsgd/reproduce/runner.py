"""Runs the cells that are missing, several side by side; each is a `train` of its own, so that one that fails
takes nothing with it, and one that was stopped goes on where it was."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

from hpc_lbsgd import progress
from hpc_lbsgd.data import fetch, manifest
from hpc_lbsgd.errors import EXIT_DONE, EXIT_STOPPED, RequestError, RunError
from hpc_lbsgd.parallel.launchers import Layout, compose
from hpc_lbsgd.parallel.refusals import refusal
from hpc_lbsgd.parallel.world import cores
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import write_atomically
from hpc_lbsgd.reproduce.cells import Cell

POLL_S = 0.5
BAR = "{percentage:3.0f}% |{bar}| {elapsed}, ETA {remaining}{postfix}"
SMALL_SAMPLES = 20_000


def prepare_small(recipe: Recipe) -> None:
    """Fashion-MNIST, and the 20,000 of its images that the small tables use, if they are not there yet."""
    target = Path(recipe.data.train)
    if not target.exists() and target == Path(f"data/fashion-mnist/train-{SMALL_SAMPLES}.arrow"):
        train, _ = fetch.fashion_mnist(target.parent)
        manifest.subset(train, target, SMALL_SAMPLES)


def run_cells(cells: list[Cell], ranks: int, jobs: int, oversubscribe: bool) -> int:
    """Run what is not finished; EXIT_DONE, or EXIT_STOPPED after a signal. Raises RunError at the first failure
    that is no result."""
    unique = {c.folder.path: c for c in cells}
    waiting = deque(c for c in unique.values() if not c.finished)
    if not waiting:
        return EXIT_DONE
    running: dict[subprocess.Popen, Cell] = {}
    asked: list[int] = []
    before = {s: signal.signal(s, lambda n, f: asked.append(n)) for s in (signal.SIGINT, signal.SIGTERM)}
    done = len(unique) - len(waiting)
    pace = Pace(list(unique.values()))
    bar = progress.bar(total=pace.total, initial=pace.done(), bar_format=BAR)
    try:
        while (waiting and not asked) or running:
            while waiting and len(running) < jobs and not asked:
                cell = waiting.popleft()
                running[start(cell, ranks, jobs, oversubscribe)] = cell
                bar.set_postfix_str(f"{done} of {len(unique)} runs; {running_names(running)}", refresh=False)
            time.sleep(POLL_S)
            for process, cell in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[process]
                if cell.finished:
                    done += 1
                    say_done(bar, cell, f"{done} of {len(unique)} runs, ETA {timedelta(seconds=round(pace.left_s()))}")
                elif not asked:
                    refuse(cell, ranks)
                    raise RunError(
                        f"{cell.name}: train ended with {code}; see {log_of(cell)}. Finished runs are kept: start the "
                        "same command again"
                    )
            bar.n = pace.done()
            bar.refresh()
            if asked:
                stop(running)
    finally:
        stop(running, wait=True)
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_STOPPED if asked and (waiting or any(not c.finished for c in unique.values())) else EXIT_DONE


class Pace:
    """How much of all runs is done, in images, and how long the rest takes at the pace since this start."""

    def __init__(self, cells: list[Cell]):
        self.runs = [(c, c.recipe.build_schedule(c.recipe.data.samples)) for c in cells]
        self.total = sum(schedule.samples_ahead(0) for _, schedule in self.runs)
        self.before, self.since = self.done(), time.monotonic()

    def done(self) -> float:
        return sum(s.samples_ahead(0) * (1.0 if c.finished else c.progress(s.steps)) for c, s in self.runs)

    def left_s(self) -> float:
        done = self.done()
        return (time.monotonic() - self.since) * (self.total - done) / max(1.0, done - self.before)


def running_names(running: dict) -> str:
    return "; ".join(cell.name for cell in running.values())


def say_done(bar, cell: Cell, where: str) -> None:
    """A line a finished run where there is no bar to look at."""
    if bar.disable:
        result = cell.result
        what = f"diverged at step {result.diverged_at}" if result.diverged_at is not None else "done"
        error = f", error {result.error:.2f} %" if result.error is not None else ""
        progress.note(f"{cell.name}: {what}{error}, {result.seconds:.0f} s of training; {where}")


def log_of(cell: Cell) -> Path:
    return cell.folder.path.with_suffix(".log")


def refuse(cell: Cell, ranks: int) -> None:
    """Raises RequestError where mpirun could not start the ranks: its words are the log's last."""
    with open(log_of(cell), "rb") as log:
        log.seek(max(0, log.seek(0, 2) - 4096))
        problem = refusal(log.read().decode(errors="replace").rpartition("\n$ ")[2], Layout(ranks))
    if problem:
        raise RequestError(problem)


def start(cell: Cell, ranks: int, jobs: int, oversubscribe: bool) -> subprocess.Popen:
    """Start, or go on with, one cell."""
    path = cell.folder.path
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = path.with_suffix(".yaml")
    write_atomically(recipe, cell.recipe.to_yaml())
    program = [sys.executable, "-m", "hpc_lbsgd.cli", "train", str(recipe), "--run", str(path)]
    threads = max(1, cores() // (jobs * ranks))
    program += [
        part
        for key in ("threads", "loader_threads")
        if getattr(cell.recipe.machine, key) is None and cell.recipe.determinism != "any-ranks"
        for part in ("--set", f"machine.{key}={min(threads, 8)}")
    ]
    if cell.folder.exists():
        program += ["--resume"]
    line = compose(Layout(ranks, oversubscribe=oversubscribe), {}, program) if ranks > 1 else program
    progress.running(line)
    with open(log_of(cell), "ab") as log:
        log.write(f"$ {shlex.join(line)}\n".encode())
        log.flush()
        return subprocess.Popen(line, stdout=log, stderr=log, env=os.environ, start_new_session=True)


def stop(running: dict, wait: bool = False) -> None:
    """Ask runs to stop at a safe point, once; with `wait`, until they have."""
    for process in running:
        if process.poll() is None and not getattr(process, "asked", False):
            process.asked = True
            process.send_signal(signal.SIGUSR2)
    if wait:
        for process in running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
