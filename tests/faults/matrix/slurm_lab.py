"""Jobs of a real Slurm of 32 nodes (tests/lab.py) that lose their node, their controller, their place."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lab as labs
import runs
from core import Injection, Row, hold
from lab import Victim, site, submitted

EPOCHS = 100  # of six steps: a job lives through its whole chain, and then hurries


@functools.cache
def place() -> Path:
    """What all nodes see."""
    folder = Path(tempfile.mkdtemp(prefix="faults-slurm-"))
    folder.chmod(0o755)
    return folder


@functools.cache
def lab() -> labs.Lab:
    running = labs.start(place())
    running.env["PYTHONPATH"] = os.pathsep.join([running.env["PYTHONPATH"], str(Path(__file__).parent)])
    atexit.register(shutil.rmtree, place(), ignore_errors=True)
    atexit.register(running.stop)
    return running


def recipe(folder: Path) -> Path:
    return runs.recipe(folder, model={"name": "hurt:slow_model"}, train={"epochs": EPOCHS},
                       machine={"stall_timeout_s": 10.0})  # fmt: skip


@functools.cache
def reference() -> str:
    folder = Path(tempfile.mkdtemp(prefix="faults-slurm-reference-"))
    digest = runs.finished(1, recipe(folder), folder / "run", seconds=300)
    shutil.rmtree(folder)
    return digest


class Hurt(Victim):
    """The ways beside those of tests/slurm."""

    def node_hangs(self) -> None:
        """Every process of it stops: its heart beats no more, and nobody hears that it died."""
        node = self.second_node()
        self.lost.append(node)
        space = f"/proc/{self.lab.init_of(node)}/ns/pid"
        each = f'for p in /proc/[0-9]*; do [ "$(readlink $p/ns/pid)" = "$(readlink {space})" ]'
        self.lab.call("bash", "-c", each + " && kill -STOP ${p#/proc/}; done; true")

    def controller_gone(self) -> None:
        """As the job wants to be queued again."""
        log = self.log_file  # asked for while there is a controller
        before = log.read_text().count("does not answer; asking again")
        self.lab.call("scancel", "--batch", "--signal=USR2", self.number)
        self.lab.call("scontrol", "shutdown", "slurmctld")
        try:
            self.until(lambda: log.read_text().count("does not answer; asking again") > before, "no word of it")
        finally:
            self.lab.call("slurmctld")

    def requeued_in_a_checkpoint(self) -> None:
        (self.folder / "slow-saves").touch()
        self.until(lambda: list(self.run.glob("checkpoints/.step-*")), "no save")
        self.requeue()
        (self.folder / "slow-saves").unlink()

    @functools.cached_property
    def log_file(self) -> Path:
        return Path(self.lab.job(self.number)["StdOut"])

    def until(self, is_so, what: str, within_s: float = 120) -> None:
        end = time.monotonic() + within_s
        while not is_so():
            hold(time.monotonic() < end, what, self.log_file.read_text())
            time.sleep(0.1)


WAYS = {
    "killed_node": "a node dies",
    "node_hangs": "a node hangs",
    "controller_gone": "the controller is away at a stop",
    "preemption": "preempted",
    "requeued_in_a_checkpoint": "requeued in a checkpoint",
}


def one(rng: random.Random, _: Path) -> Iterator[Injection]:
    """An array of two tasks on one run folder; the one that gets it is hurt in each way."""
    running, folder = lab(), Path(tempfile.mkdtemp(dir=place()))
    folder.chmod(0o755)
    path, run = recipe(folder), folder / "run"
    two = site(folder, ranks_per_node=1, srun_mpi="none")
    begun = time.monotonic()
    shown = running.command("submit", path, "--run", run, "--nodes", 2, "--dry-run", "--site", two, cwd=folder)
    (folder / "job.sbatch").write_text(shown.stdout)
    words = ["--array=0-1", f"--output={folder}/job-%a.log", folder / "job.sbatch", path, "--run", run]
    (number,) = submitted(running.call("sbatch", *words, cwd=folder).stdout)
    job = Hurt(running, run, f"{number}_0")
    job.wait_for_start(1)
    owner = json.loads((run / "owner.json").read_text())["job"]
    job.number = owner
    hold(owner in (f"{number}_0", f"{number}_1"), f"the folder is of {owner}")
    other = f"{number}_1" if owner.endswith("_0") else f"{number}_0"
    facts = running.wait(other, 120)
    said = Path(facts["StdOut"]).read_text()
    hold(facts["ExitCode"] == "2:0" and "in use by Slurm job" in said, f"array task {other}: {facts['ExitCode']}", said)
    yield Injection(f"array of two tasks, task {owner} has the run", "the other is refused",
                    round(time.monotonic() - begun, 1), 0, said.splitlines()[-1])  # fmt: skip
    ways = rng.sample(list(WAYS), len(WAYS))
    for count, way in enumerate(ways, 1):
        steps = rng.randint(1, 8)
        job.wait_for_new_steps(steps)
        done, begun = runs.last_step(run), time.monotonic()
        getattr(job, way)()
        job.wait_for_start(count + 1)
        took = time.monotonic() - begun
        if way in ("killed_node", "node_hangs"):
            facts = running.job(owner)
            hold(job.lost[-1] not in facts["NodeList"], f"{way}: {job.lost[-1]} again", job.log())
            if way == "node_hangs":
                running.kill_node(job.lost[-1])
            running.start_node(job.lost.pop())
        yield Injection(f"{WAYS[way]}, after {steps} steps of start {count}", "queued again, goes on", round(took, 1),
                        max(done - runs.resumed_at(run), 0), job.log_file.read_text().splitlines()[-1])  # fmt: skip
    (folder / "fast").touch()
    facts = running.wait(owner, 240)
    hold(facts["JobState"] == "COMPLETED", f"{ways}: {facts['JobState']}", job.log())
    hold(runs.ending(run) == reference(), f"{ways}: other weights")
    runs.whole(run, EPOCHS * 6)
    hold(not (run / "owner.json").exists(), "it still has an owner")


ROWS = [
    Row("slurm", "in a real Slurm: an array's task, a node that dies or hangs, a controller that is away at the stop, "
        "preemption, a requeue in a checkpoint", "queued again and gone on with, to the weights of a run on one rank",
        42, one, ranks=True, cost_s=25, why_not=labs.why_not)
]  # fmt: skip
