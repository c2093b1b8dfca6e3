"""PBS, LSF and Flux: one life of a job in each, on stand-ins (tests/standins), which are not the real systems."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import standins
from conftest import changed, command, records, write_environment, write_recipe

from hpc_lbsgd import owner
from hpc_lbsgd.cluster import submit
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.report.watch import Live
from hpc_lbsgd.schedulers.known import SCHEDULERS

ROOT = Path(__file__).parents[2]
SYSTEMS = [name for name in SCHEDULERS if name != "slurm"]
LIVES = [*SYSTEMS, "deaf flux"]  # the last: what asks its ranks to stop fails
STEPS = 150
# lasts minutes in the job's first start, which is stopped before
MODEL = """\
import os, time
from torch import nn

slow = os.path.exists("my run/restarts") and open("my run/restarts").read().split()[-1] == "1"

class Pause(nn.Module):
    def forward(self, x):
        time.sleep(1.0 * slow)
        return x

def model(channels, classes):
    return nn.Sequential(Pause(), nn.Flatten(), nn.Linear(64 * channels, classes))
"""


def wait_for(what, job, within_s=240):
    end = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < end, "\n".join(
            p.read_text() for p in [*Path(job.run).glob("*job*"), *Path(job.run).glob("*.OU")]
        )
        time.sleep(0.1)


def said(job):
    """In all the logs of a run: a job that goes on under another number has another log."""
    pattern = "*.OU" if job.scheduler == "pbs" else "job-*.log"
    return "".join(path.read_text() for path in sorted(Path(job.run).glob(pattern)))


class Place:
    """A folder in which a stand-in has the programs of a batch system."""

    def __init__(self, folder, system):
        self.folder, self.system = folder, system
        self.env = standins.install(folder / "standin", system)
        self.env["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name, value in self.env.items():
            self.patch.setenv(name, value)
        self.patch.chdir(self.folder)
        return self

    def __exit__(self, *problem):
        self.patch.undo()

    def site(self, **keys):
        content = {"scheduler": self.system, "gpus_per_node": 0, "ranks_per_node": 2, **keys}
        (self.folder / "site.yaml").write_text(json.dumps(content))
        return "site.yaml"


@pytest.fixture(scope="module")
def recipe(small_recipe):
    return changed(small_recipe, determinism="any-ranks", data__eval=None, train__epochs=STEPS, train__max_steps=STEPS,
                   batch__workers=2, model={"name": "slow:model"}, machine__engine="torch",
                   train__preflight=False)  # fmt: skip


def packed(folder):
    """Keys of a site whose jobs have their environment from a bundle."""
    python = write_environment(folder / "env") / "bin" / "python"
    subprocess.run([python, "-m", "hpc_lbsgd.cli", "bundle", folder / "env.tar"], check=True, capture_output=True)
    return {"bundle": str(folder / "env.tar"), "stage_dir": str(folder / "disk"), "python": str(python)}


def with_bundle(life):
    return life in SYSTEMS and "bundle" in SCHEDULERS[life].can


@pytest.fixture(scope="module")
def jobs(recipe, tmp_path_factory):
    """A training job in each, side by side: most of the time is waiting."""
    found = {}
    for life in LIVES:
        folder, system = tmp_path_factory.mktemp(life), life.split()[-1]
        (folder / "slow.py").write_text(MODEL)
        with Place(folder, system) as place:
            path = write_recipe(folder / "r.yaml", recipe)
            if life != system:
                (folder / "standin" / "deaf").touch()
            keys = packed(folder) if with_bundle(life) else {}
            found[life] = place, submit(path, ["seed=7"], site=place.site(**keys), run="my run")
    for place, job in found.values():
        with place:
            wait_for(lambda job=job: any(r["kind"] == "step" for r in read_metrics(RunFolder(job.run).metrics)), job)
        standins.late(place.folder / "standin")
    return found


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "slow.py").write_text(MODEL)
    done = command("train", write_recipe(folder / "r.yaml", recipe), "--run", folder / "run", cwd=folder,
                   env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return records(folder / "run", "end")[-1]["weights_sha256"]


@pytest.mark.parametrize("life", LIVES)
def test_a_job_stops_before_its_limit_and_goes_on_to_the_same_weights(life, jobs, undisturbed):
    place, job = jobs[life]
    with place:
        run = RunFolder(job.run)
        assert job.result(240, 0.2)["status"]["status"] == "done"
        if with_bundle(life):
            assert "env.tar: unpacked on 1 nodes" in said(job) and "there before on 1, in" in said(job)
        assert "asked to stop at a safe point" in said(job) and "stopped at a safe point; queued again" in said(job)
        assert len(records(run.path, "start")) > 1 and job.state == "COMPLETED"
        assert [r["step"] for r in records(run.path, "step")] == list(range(STEPS))
        assert {len(r["ranks"]) for r in json.loads(run.environment.read_text())} == {2}
        assert records(run.path, "end")[-1]["weights_sha256"] == undisturbed
        assert not (run.path / "owner.json").exists() and "done: " in said(job)


# In place of Python, but for the command that takes the run folder
STUB = f"""\
#!/usr/bin/env bash
case "$*" in *" own "*|*" suspects "*) exec {sys.executable} "$@" ;; esac
[ "$(awk 'END {{print $NF}}' run/restarts)" = 1 ] ||
    {{ touch again; while kill -0 $PPID 2>/dev/null; do sleep 1; done; }}
kill -9 $$
"""


@pytest.fixture(scope="module")
def crashing(tmp_path_factory):
    """A job in each that dies at once in its first start, and waits in its second."""
    found = {}
    for system in SYSTEMS:
        folder = tmp_path_factory.mktemp(f"crash-{system}")
        (folder / "stub").write_text(STUB)
        (folder / "stub").chmod(0o755)
        with Place(folder, system) as place:
            found[system] = place, submit("goyal-resnet50", site=place.site(python=str(folder / "stub")), run="run")
    return found


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_crash_is_queued_again_and_a_cancelled_job_is_not(system, crashing):
    place, job = crashing[system]
    with place:
        wait_for((place.folder / "again").exists, job)
        wait_for(lambda: job.state == "RUNNING", job)
        assert "no rank said why" in said(job) and "queued again" in said(job)
        assert (job.now == job.number) is (system == "lsf")
        title, run = SCHEDULERS[system].title, RunFolder("run")
        with pytest.raises(RequestError, match=f"in use by {title} job {re.escape(job.now)} "):
            owner.check("run")
        run.recipe.touch()
        run.environment.write_text(json.dumps([{"scheduler": system, "job_id": job.now}]))
        assert re.fullmatch(rf"job {re.escape(job.now)}: RUNNING, \S.* left", Live(run).job())
        assert owner.at_work("run")
        job.cancel()
        assert job.wait(60, 0.1) in ("CANCELLED", "FAILED")
        time.sleep(1)
        assert not owner.at_work("run")
        assert job.state in ("CANCELLED", "FAILED") and said(job).count("; queued again") == 1, said(job)


@pytest.mark.parametrize(
    "system, line, words",
    [
        ("pbs", "#PBS -l nodes=2:ppn=8", ["qsub"]),  # Torque's
        ("pbs", "#PBS --walltime=1:00", ["qsub"]),
        ("lsf", "#BSUB --walltime 1:00", ["bsub"]),
        ("flux", "# flux: --walltime=1h", ["flux", "batch"]),
    ],
)
def test_a_stand_in_refuses_what_its_manual_does_not_have(system, line, words, tmp_path):
    with Place(tmp_path, system):
        (tmp_path / "job").write_text(f"#!/bin/bash\n{line}\ntrue\n")
        with open(tmp_path / "job") as script:
            done = subprocess.run([*words, *([] if system == "lsf" else ["job"])], stdin=script, capture_output=True)
    assert done.returncode and (b"illegal" in done.stderr or b"unrecognized" in done.stderr), done.stderr
