"""What may be asked of `submit`, what comes of it, and the job that Python gets: without a Slurm."""

import json
import os
import re
from datetime import datetime, timedelta

import pytest
from conftest import command

from hpc_lbsgd.cluster import SubmittedJob, forecast, sites, submission, submit, submit_array
from hpc_lbsgd.cluster.jobs import Request
from hpc_lbsgd.cluster.suspects import suspects
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import validate
from hpc_lbsgd.records import RunFolder


def lines_of(**asked):
    found = submission.prepare("goyal-resnet50", [], "generic", Request(run="r", **asked))
    return found.texts[0].splitlines()


@pytest.mark.parametrize(
    "nodes, spare, asked, least, most",
    [
        ("4-32", 0, "4-32", 4, 32),
        ("4-32", 2, "4-34", 4, 32),
        ("32", 1, "33", 32, 32),
        ("32", 0, "32", "", ""),
        ("7-7", 0, "7", "", ""),
    ],
)
def test_a_range_of_nodes(nodes, spare, asked, least, most):
    lines = lines_of(nodes=nodes, spare=spare)
    assert {f"#SBATCH --nodes={asked}", f"least={least}", f"most={most}"} < set(lines)
    assert ("#SBATCH --no-kill" in lines) is bool(least)
    assert ("#SBATCH --ntasks-per-node=8" in lines) is ("-" not in asked)
    assert ({"#SBATCH --mincpus=8", "each=8"} < set(lines)) is ("-" in asked)


def test_limits_are_slurms():
    lines = lines_of(time_min="2:00:00", deadline="2030-01-01T08:00", nodes="2-4", grow_every_hours=0.5)
    assert {"#SBATCH --time-min=2:00:00", "#SBATCH --deadline=2030-01-01T08:00", "grow_every_s=1800"} < set(lines)


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"nodes": "8-4"}, "--nodes 8-4: expected a number, or a range"),
        ({"nodes": "0"}, "--nodes 0: expected"),
        ({"nodes": "4-"}, "--nodes 4-: expected"),
        ({"nodes": "2-4", "chain": True}, "--chain: each of its jobs has a number of nodes of its own"),
        ({"spare": 1, "sweep": [1, 2]}, "--sweep: each of its jobs"),
        ({"grow_every_hours": 2.0, "nodes": 4}, "--grow-every with --nodes 4: say to how many"),
        ({"deadline": "tomorrow"}, "--deadline tomorrow: expected a time such as"),
        ({"time_min": "soon"}, "--time-min = 'soon'"),
        ({"array": "seed"}, "--array seed: expected KEY=A-B or KEY=A,B,C"),
        ({"array": "seed=3-1"}, "--array seed=3-1: expected"),
        ({"array": "seed=1,1"}, "--array seed=1,1: expected"),
        ({"array": "data.train=/a,/b"}, "--array data.train=/a,/b: expected"),
        ({"array": "sead=0-4"}, "unknown key sead (= 0)"),
        ({"array": "optim.base_lr=0.1,0"}, "optim.base_lr = 0"),
        ({"array": "seed=0-4", "resume": "--resume"}, "name the folder of its runs with --run"),
        ({"array": "seed=0-4", "chain": True}, "--chain with --array: one of them"),
    ],
)
def test_wrong_requests_are_refused(asked, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        submission.prepare("goyal-resnet50", [], "generic", Request(**asked))


def test_the_command_refuses_too():
    found = command("submit", "goyal-resnet50", "--nodes", "8-4")
    assert found.returncode == 2 and "--nodes 8-4: expected" in found.stderr, found.stderr


def test_an_array_has_a_run_a_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def prepared(**asked):
        return submission.prepare("goyal-resnet50", [], "generic", Request(array="seed=3-5", run="all", **asked))

    found = prepared()
    lines = found.texts[0].splitlines()
    assert {"#SBATCH --array=0-2", "array_key=seed", "array_values=(3 4 5)"} < set(lines)
    assert found.jobs[0].log == "all/job-%A_%a.log" and found.run == "all"
    there = tmp_path / "all" / "seed=4"
    there.mkdir(parents=True)
    (there / "recipe.yaml").write_text("")
    with pytest.raises(RequestError, match="--run all/seed=4: a run is there already"):
        prepared()
    with pytest.raises(RequestError, match="no run in all/seed=3"):
        prepared(resume="--resume")
    (tmp_path / "all" / "recipe.yaml").write_text("")
    with pytest.raises(RequestError, match="--run all: a run is there already"):
        prepared()


# ---------------------------------------------------------------- what will have been reached

SLOW = {"data": {"samples": 960}, "batch": {"workers": 8, "samples_per_worker": 4}, "train": {"epochs": 10},
        "schedule": {"warmup": "none", "kind": "cosine"}}  # fmt: skip


def test_what_will_have_been_reached_follows_from_a_rate():
    """A step is 32 images: on 2 ranks four workers each, 16 images in a row; at 2 images/s that is 8 s. 300 steps."""
    site = sites.Site(ranks_per_node=1)
    said = forecast.said(validate(SLOW), site, Request(nodes="2-4", time="20:00", images_per_s=2.0), "nowhere")
    assert "step 150 of 300 (epoch 5 of 10) on 2 nodes, step 300 of 300 (epoch 10 of 10) on 4" in said, said
    assert "at 2 images/s a rank as you say" in said
    soon = (datetime.now() + timedelta(minutes=10, seconds=2)).isoformat(timespec="seconds")
    request = Request(nodes=2, time="20:00", deadline=soon, images_per_s=2.0)
    assert "step 75 of 300" in forecast.said(validate(SLOW), site, request, "nowhere")
    assert forecast.said(validate(SLOW), site, Request(), "nowhere") is None


def test_a_run_that_goes_on_has_a_rate(tmp_path):
    folder = RunFolder(tmp_path)
    folder.recipe.write_text(validate(SLOW).to_yaml())
    records = [{"kind": "start", "step": 0, "ranks": 16, "workers": 8}]
    records += [{"kind": "step", "step": i, "images_per_s": 16.0} for i in range(3)]
    folder.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert forecast.rate_of(folder) == 2.0  # eight of the ranks had no worker
    folder.checkpoints.mkdir()
    (folder.checkpoints / "LATEST").write_text("step-00000100\n")
    said = forecast.said(validate(SLOW), sites.Site(ranks_per_node=1), Request(nodes=2, time="20"), str(tmp_path))
    assert "step 250 of 300" in said and f"as {tmp_path} had" in said


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("2:30", 150), ("1:02:03", 3723), ("1-2", 93600), ("1-2:03", 93780), ("2-00:00:00", 172800)],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert forecast.seconds_of(text) == seconds


# ---------------------------------------------------------------- nodes to go on without


def test_suspects_hung_or_are_slow_still(tmp_path):
    folder = RunFolder(tmp_path)
    records = [
        {"kind": "start", "step": 0},
        {"kind": "event", "event": "slow", "step": 1, "rank": 3, "host": "before"},
        {"kind": "start", "step": 2},
        {"kind": "event", "event": "slow", "step": 3, "rank": 1, "host": "n1.cluster"},
        {"kind": "event", "event": "slow", "step": 3, "rank": 2, "host": "n2"},
        {"kind": "event", "event": "slow-ended", "step": 9, "rank": 2, "host": "n2"},
    ]
    assert suspects(tmp_path) == []
    folder.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    folder.claim_failure(crashed=True, stalest_hosts=["n7.cluster"])
    assert suspects(tmp_path) == ["n1", "n7"]
    assert command("suspects", tmp_path).stdout == "n1 n7\n"


# ---------------------------------------------------------------- the job that Python gets


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands; `state` holds what squeue says."""
    for name, body in (
        ("sbatch", 'echo "$@" >>asked; echo Submitted batch job 7'),
        ("squeue", 'cat state 2>/dev/null || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }'),
        ("scancel", 'echo CANCELLED >state; echo "scancel $*" >>asked'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_from_python(slurm):
    job = submit("goyal-resnet50", ["seed=1"], nodes="2-4", run="mine")
    assert isinstance(job, SubmittedJob) and (job.number, job.run, str(job.log)) == ("7", "mine", "mine/job-7.log")
    assert "mine/job.sbatch goyal-resnet50 --set seed=1 --run mine" in (slurm / "asked").read_text()
    (slurm / "state").write_text("PENDING\n")
    assert job.state == "PENDING"
    with pytest.raises(TimeoutError, match="job 7 is PENDING after 0 s"):
        job.wait(0)
    (slurm / "state").write_text("COMPLETED\n")
    folder = RunFolder("mine")
    folder.write_status("done", step=2)
    folder.metrics.write_text("".join(json.dumps({"kind": "step", "step": i, "loss": i}) + "\n" for i in range(2)))
    found = job.result()
    assert (found["status"]["status"], found["step"]["loss"]) == ("done", 1)
    (slurm / "state").unlink()  # Slurm has forgotten it
    assert job.state == "COMPLETED"
    folder.status_file.unlink()
    folder.claim_failure(error="no room")
    with pytest.raises(RunError, match="job 7 is FAILED: no room; log: mine/job-7.log"):
        job.result()
    job.cancel()
    assert job.state == "CANCELLED" and "scancel 7" in (slurm / "asked").read_text()


def test_jobs_of_one_second_have_folders_of_their_own(slurm):
    assert submit("goyal-resnet50").run != submit("goyal-resnet50").run


def test_ranks_without_work_are_said():
    def notes(nodes, *settings):
        return submission.prepare("goyal-resnet50", list(settings), "generic", Request(nodes=nodes)).notes

    assert notes("2-4", "batch.workers=16") == ["--nodes 2-4: 16 of 32 ranks have no work, for batch.workers = 16"]
    assert notes("2-4", "batch.workers=32") == notes("2-4") == []


def test_an_array_from_python_and_what_is_no_single_job(slurm):
    jobs = submit_array("goyal-resnet50", "seed=5,8", run="all")
    assert [(j.number, j.run, str(j.log)) for j in jobs] == [
        ("7_0", "all/seed=5", "all/job-7_0.log"),
        ("7_1", "all/seed=8", "all/job-7_1.log"),
    ]
    with pytest.raises(RequestError, match="array: submit has one job"):
        submit("goyal-resnet50", array="seed=5,8", run="other")
    found = command("submit", "goyal-resnet50", "--array", "seed=5,8", "--run", "more here")
    assert "report on all: hpc-lbsgd report 'more here'/seed=*" in found.stdout, found.stderr
