"""Jobs of users who are not root, on a Slurm as a site runs it (tests/strict_lab.py): cores and devices are given by
cgroups, jobs are preempted by quality of service, and end with their time."""

import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import strict_lab
from conftest import LIMIT_S, changed, records, write_recipe
from lab import site, start, submitted
from test_stops import wait_for

from hpc_lbsgd.records import read_metrics

# takes its time in a job, more of it later on, so that it can be hurt on the way; it hurries when `fast-JOB` is there
MODEL = """\
import os, time
from torch import nn

class Pause(nn.Module):
    passes = 0

    def forward(self, x):
        if "SLURM_JOB_ID" in os.environ and not os.path.exists("fast-" + os.environ["SLURM_JOB_NAME"]):
            Pause.passes += 1
            time.sleep(0.2 if Pause.passes < 60 else 2)
        return x

def model(channels, classes):
    return nn.Sequential(Pause(), nn.Flatten(), nn.Linear(64 * channels, classes))
"""
STEPS = 120

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def site_lab(tmp_path_factory):
    reason = strict_lab.why_not()
    if reason:
        pytest.skip(reason)
    running = start(tmp_path_factory.mktemp("strict"), strict_lab.StrictLab)
    try:
        reached = running.as_user("ada", sys.executable, "-c", "import hpc_lbsgd", check=False)
        if reached.returncode:
            pytest.skip(f"another user cannot use this Python or this checkout: {reached.stderr[-300:]}")
        yield running
    finally:
        running.stop()


class User:
    """One who is not root, his folder and his jobs."""

    def __init__(self, lab, name):
        self.lab, self.name, self.home = lab, name, lab.home(name)

    def own(self, path):
        uid = strict_lab.USERS[self.name]
        subprocess.run(["chown", "-R", f"{uid}:{uid}", path], check=True)
        return path

    def call(self, *words, **more):
        return self.lab.as_user(self.name, *words, **more)

    def command(self, *words, **more):
        return self.call(sys.executable, "-m", "hpc_lbsgd.cli", *words, **more)

    def submit(self, recipe, run, **keys):
        """Its number. keys: of its site."""
        nodes = keys.pop("nodes", 1)
        path = self.own(site(self.home, f"{run}-site", ranks_per_node=1, **keys))
        said = self.command("submit", recipe, "--run", self.home / run, "--nodes", nodes, "--site", path).stderr
        (number,) = submitted(said)
        return number

    def urgent_job(self):
        """One that takes the whole second node for a moment."""
        (self.home / "urgent.sh").write_text("#!/bin/sh\nsleep 1\n")
        self.sbatch("--qos=urgent", "-N1", "-n2", "-w", self.lab.nodes[1], "-o", "/dev/null", "urgent.sh")

    def sbatch(self, *words):
        (number,) = submitted(self.call("sbatch", *words).stdout)
        return number


@pytest.fixture(scope="module")
def ada(site_lab, small_data):
    user = User(site_lab, "ada")
    shutil.copytree(small_data / "train", user.home / "train")
    (user.home / "slow.py").write_text(MODEL)
    user.own(user.home)
    user.command("data", "pack", "train", "packed")
    return user


@pytest.fixture(scope="module")
def recipe(ada, small_recipe):
    return changed(small_recipe, determinism="any-ranks", data__train="packed", data__eval=None, checkpoint__steps=20,
                   train__epochs=STEPS, train__max_steps=STEPS, model={"name": "slow:model"}, batch__workers=4,
                   batch__bn_group=None, train__preflight=False, machine__stage_dir="/tmp/stage-$USER")  # fmt: skip


class Job:
    """One of ada's, and its run."""

    def __init__(self, user, name, content, **keys):
        self.lab, self.run = user.lab, user.home / name
        path = user.own(write_recipe(user.home / f"{name}.yaml", content))
        self.number = user.submit(path, name, **keys)

    def facts(self):
        return self.lab.job(self.number)

    def log(self):
        path = self.facts()["StdOut"]
        return open(path).read() if os.path.exists(path) else "(no log)"

    def steps_of_start(self, count):
        """Wait until start number `count` has done some steps."""
        metrics = self.run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(records(self.run, "start")) >= count, LIMIT_S, self.log)
        first = records(self.run, "start")[-1]["step"]
        wait_for(lambda: any(r["step"] >= first + 3 for r in records(self.run, "step")), LIMIT_S, self.log)

    def stopped(self):
        """Wait until it has stopped at a safe point, and is in the queue."""
        wait_for(lambda: "stopped at a safe point; queued again" in self.log(), LIMIT_S, self.log)


@pytest.fixture(scope="module")
def short(ada, recipe):
    """A job with two minutes' time, of which Slurm leaves it the half, at work while the other tests are."""
    torch = changed(recipe, machine__engine="torch")
    return Job(ada, "short", torch, srun_mpi="none", time_limit="00:02:00", max_restarts=20)


def ends_as_if_nothing_had_been(job):
    (job.run.parent / f"fast-{job.run.name}").touch()
    assert job.lab.wait(job.number, LIMIT_S)["JobState"] == "COMPLETED", job.log()
    assert [r["step"] for r in records(job.run, "step")] == list(range(STEPS)), job.log()
    assert {r["kind"] for r in read_metrics(job.run / "metrics.lost.jsonl")} == {"end"}, (
        job.log()
    )  # a safe stop each time
    whole = records(job.run.parent / "whole", "end")[-1]["weights_sha256"]
    assert records(job.run, "end")[-1]["weights_sha256"] == whole
    assert not (job.run / "owner.json").exists() and "killed or crashed" not in job.log(), job.log()
    for path in (job.run, *job.run.rglob("*")):
        there = path.lstat()
        assert there.st_uid == strict_lab.USERS["ada"] and not stat.S_IMODE(there.st_mode) & 0o077, path


def test_by_quality_of_service_a_job_is_queued_again_and_so_is_one_that_was_to_be_cancelled(
    site_lab, ada, recipe, short
):
    horovod = changed(recipe, machine__engine="horovod")
    spare = Job(ada, "spare", horovod, nodes=2, qos="spare")
    cheap = Job(ada, "cheap", horovod, qos="cheap", launcher="mpirun")
    ada.command("train", "short.yaml", "--run", "whole")
    for job in (spare, cheap):
        job.steps_of_start(1)
    ada.urgent_job()
    for job in (spare, cheap):
        job.stopped()
        (ada.home / f"fast-{job.run.name}").touch()
    for job in (spare, cheap):
        ends_as_if_nothing_had_been(job)
    assert [r["ranks"] for r in records(spare.run, "start")] == [2, 2]
    for node in site_lab.nodes:  # data that was staged there is hers alone
        inside = ["nsenter", f"--target={site_lab.init_of(node)}", "--mount", "--pid"]
        listed = site_lab.call(*inside, "find", "/tmp/stage-ada", "-mindepth", 1, "-printf", "%u %m %f\n").stdout
        assert "ada 700 23001-" in listed and "shard-000000.tar" in listed, listed
        assert {line.split()[0] for line in listed.splitlines()} == {"ada"}, listed
    assert len(records(cheap.run, "start")) == 2


PROBE = """\
import os, torch
from hpc_lbsgd import recipe
from hpc_lbsgd.train import job

_, engine = job.meet(recipe.read("fashion-mnist", ["machine.engine=torch"]))
print("cores", engine.cores, "threads", torch.get_num_threads(), "of", os.cpu_count(), flush=True)
engine.close()
"""


def test_a_rank_has_the_cores_and_the_devices_that_its_job_was_given(site_lab, ada, recipe):
    """A GPU that was given and is not there is the end of the job: in its place the CPU would train for days."""
    (ada.home / "probe.py").write_text(PROBE)
    job = Job(ada, "gpu", changed(recipe, machine__engine="torch"), gpus_per_node=1, srun_mpi="none")
    (ada.home / "cores.sh").write_text(
        f"#!/bin/sh\nsrun --mpi=none --cpus-per-task=1 {sys.executable} probe.py\n"
        f"srun --ntasks=1 cat {site_lab.root}/dev/nvidia0 2>devices.log\n"
    )
    cores = ada.sbatch("-N1", "-n2", "-w", site_lab.nodes[1], "-o", "cores.log", "-e", "/dev/null", "cores.sh")
    facts = site_lab.wait(job.number, LIMIT_S)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.log()
    given = "a GPU was given to the job (CUDA_VISIBLE_DEVICES=0), but this node has no NVIDIA driver"
    assert given in job.log() and "failed with 2, not queued again" in job.log(), job.log()
    site_lab.wait(cores, LIMIT_S)
    said = f"cores 1 threads 1 of {os.cpu_count()}\n"  # each of the two that share the node
    assert (ada.home / "cores.log").read_text() == said * 2
    why = "No such device" if strict_lab.why_no_cgroups() else "Operation not permitted"  # there is nothing behind it
    assert why in (ada.home / "devices.log").read_text()


def test_a_job_that_is_preempted_without_a_warning_leaves_a_run_to_go_on_with(site_lab, ada):
    """Where it is cancelled, Slurm calls its state PREEMPTED: it is over, and the run has no owner."""
    stub = ada.home / "stub"
    stub.write_text(f'#!/usr/bin/env bash\ncase "$*" in *\' own \'*) exec {sys.executable} "$@" ;; esac\nsleep 60\n')
    ada.own(stub).chmod(0o700)
    there = [f"--nodelist={site_lab.nodes[1]}"]
    number = ada.submit("goyal-resnet50", "abrupt", qos="abrupt", python=str(stub), options=there)
    wait_for(lambda: (ada.home / "abrupt" / "owner.json").exists(), LIMIT_S)
    ada.urgent_job()
    assert site_lab.wait(number, LIMIT_S)["JobState"] == "PREEMPTED"
    assert json.loads((ada.home / "abrupt" / "owner.json").read_text())["job"] == str(number)
    ada.call(sys.executable, "-c", "from hpc_lbsgd.owner import check; check('abrupt')")


TAKE = "import sys; from hpc_lbsgd.owner import take; take('run'); print('has it', flush=True); sys.stdin.read()"


def test_another_user_does_not_take_what_is_hidden_from_him(site_lab, ada):
    """In a project's folder: /proc shows him none of our processes, and Slurm none of our jobs."""
    project = site_lab.root / "project"
    project.mkdir()
    (project / "run").mkdir()
    for folder in (project, project / "run"):
        folder.chmod(0o777)

    def take(user):
        words = site_lab.words_of(user, sys.executable, "-c", TAKE, cwd=project)
        return subprocess.Popen([*site_lab.inside(), *map(str, words)], env=site_lab.env, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    with take("ada") as ours:
        assert ours.stdout.readline() == "has it\n"
        (project / "run" / "owner.json").chmod(0o644)
        with take("eve") as other:
            said = "".join(other.communicate())
        assert "in use by process" in said and "has it" not in said, said
        ours.communicate("")
    staged = [sys.executable, "-c", "from pathlib import Path; from hpc_lbsgd.private import make_private as make; "
              "make(Path('staged'), 'machine.stage_dir')"]  # fmt: skip
    site_lab.as_user("ada", *staged, cwd=project)
    refused = site_lab.as_user("eve", *staged, cwd=project, check=False)
    assert f"is not a folder of yours (owner: user {strict_lab.USERS['ada']})" in refused.stderr, refused.stderr


def test_a_job_stops_before_its_time_is_up_and_goes_on(short):
    short.stopped()
    short.steps_of_start(2)
    ends_as_if_nothing_had_been(short)
