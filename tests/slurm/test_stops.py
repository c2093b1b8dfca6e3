"""What asks a job to stop, and what it finds when it wants to go on: each is one job with several starts."""

import json
import time

from conftest import changed, records, write_recipe
from lab import site, submitted

from hpc_lbsgd.records import read_metrics

# takes its time, so that a job can be asked on the way; it hurries when `fast` is there
MODEL = """\
import os, time
from torch import nn

class Pause(nn.Module):
    def forward(self, x):
        if not os.path.exists("fast"):
            time.sleep(0.05)
        return x

def model(channels, classes):
    return nn.Sequential(Pause(), nn.Flatten(), nn.Linear(64 * channels, classes))
"""
STEPS = 400


def wait_for(what, within_s=90, say=lambda: ""):
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.2)
    raise AssertionError(f"not within {within_s} s: {say()}")


def test_under_mpirun_a_job_stops_and_goes_on_as_under_srun(lab, small_recipe, tmp_path_factory):
    """A signal to the job's steps while the controller is away, then a preemption; with nothing exported by sbatch."""
    folder = tmp_path_factory.mktemp("stops")
    (folder / "slow.py").write_text(MODEL)
    recipe = changed(small_recipe, data__eval=None, train__epochs=STEPS, train__max_steps=STEPS, batch__workers=2,
                     model={"name": "slow:model"}, machine__engine="torch", train__preflight=False)  # fmt: skip
    run = folder / "run"
    odd = {"ODD": "it's me", "PYTHONPATH": lab.env["PYTHONPATH"], "OMPI_ALLOW_RUN_AS_ROOT": "1",
           "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # fmt: skip
    two = site(folder, launcher="mpirun", ranks_per_node=1, environment=odd)
    words = ["submit", write_recipe(folder / "r.yaml", recipe), "--run", run, "--nodes", 2, "--site", two]
    (number,) = submitted(lab.command(*words, cwd=folder, env={"SBATCH_EXPORT": "NONE"}).stderr)

    def log():
        path = run / f"job-{number}.log"
        return path.read_text() if path.exists() else "(no log)"

    def steps_of_start(start):
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run, "start")) >= start, say=log)
        first = records(run, "start")[-1]["step"]
        wait_for(lambda: any(r["step"] >= first + 3 for r in records(run, "step")), say=log)

    steps_of_start(1)
    pid = json.loads((run / "heartbeats" / "rank-00001.json").read_text())["pid"]
    nodes = lab.call("scontrol", "show", "hostnames", lab.job(number)["NodeList"]).stdout.split()
    far = ["--jobid", number, "--overlap", "--mpi=none", "-N1", "-n1", "-w", nodes[1], "--gpus-per-node=0"]
    assert "ODD=it's me" in lab.call("srun", *far, "cat", f"/proc/{pid}/environ").stdout.split("\0")
    lab.call("scancel", "--signal=USR1", number)
    lab.call("scontrol", "shutdown", "slurmctld")
    wait_for(lambda: "does not answer; asking again" in log(), say=log)
    assert "queued again" not in log()
    lab.call("slurmctld")
    wait_for(lambda: "stopped at a safe point; queued again" in log(), say=log)

    steps_of_start(2)
    (folder / "urgent.sh").write_text("#!/bin/sh\nsleep 1\n")
    lab.call("sbatch", "-p", "urgent", "--exclusive", "-w", lab.job(number)["NodeList"], "-o", "/dev/null",
             folder / "urgent.sh", cwd=folder)  # fmt: skip
    wait_for(lambda: log().count("asked to stop at a safe point") >= 2, say=log)
    wait_for(lambda: lab.job(number)["JobState"] != "RUNNING", say=log)
    (folder / "fast").touch()
    assert lab.wait(number, 120)["JobState"] == "COMPLETED", log()
    assert [r["step"] for r in records(run, "step")] == list(range(STEPS))
    # both stops were safe ones: no step was lost
    assert {r["kind"] for r in read_metrics(run / "metrics.lost.jsonl")} == {"end"}, log()
    assert len(records(run, "start")) == 3, log()
