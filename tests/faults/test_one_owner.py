"""Two starts on one run folder: exactly one goes on, and the other changes nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import changed, command, records, write_recipe

LAUNCH = ["launch", "--np", "2", "--oversubscribe", "--", "train"]


def start(words, recipe, run, *more):
    line = [sys.executable, "-m", "hpc_lbsgd.cli", *words, recipe, "--run", run, *more]
    return subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(is_so, job, timeout=120):
    end = time.monotonic() + timeout
    while not is_so():
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def stopped(pid):
    """All its threads are: one that waits for the disk first ends what it writes."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks)


def steps(run):
    return [r["step"] for r in records(run, "step")]


@pytest.fixture
def recipe(small_recipe, tmp_path):
    return write_recipe(tmp_path / "r.yaml", changed(small_recipe, train__max_steps=10, data__eval=None))


@pytest.mark.parametrize("one, other", [(["train"], ["train"]), (LAUNCH, LAUNCH)])
def test_of_two_starts_at_the_same_time_one_goes_on(recipe, tmp_path, one, other):
    run = tmp_path / "run"
    jobs = [start(words, recipe, run, "--resume-if-exists") for words in (one, other)]
    said = [job.communicate(timeout=240)[0] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 2], said
    refused = said[[job.returncode for job in jobs].index(2)]
    assert re.search(r"hpc-lbsgd: --run \S+run: in use by process \d+ on \S+( of .*)? since 20", refused), refused
    assert "Traceback" not in refused
    assert steps(run) == list(range(10)) and len(records(run, "start")) == 1
    assert json.loads((run / "status.json").read_text())["status"] == "done" and not (run / "owner.json").exists()


def test_a_start_beside_a_running_one_changes_nothing_and_after_kill_9_it_goes_on(small_recipe, tmp_path):
    """The running one saves at every step: it is always at it."""
    content = changed(small_recipe, train__max_steps=4000, train__epochs=4000, checkpoint__steps=1, data__eval=None)
    recipe, run = write_recipe(tmp_path / "r.yaml", content), tmp_path / "run"
    job = start(["train"], recipe, run)
    wait_for(lambda: len(steps(run)) > 3, job)
    os.kill(job.pid, signal.SIGSTOP)
    wait_for(lambda: stopped(job.pid), job)
    before = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in run.rglob("*")}
    for words in (["train"], LAUNCH):
        refused = command(*words, recipe, "--run", run, "--resume")
        assert refused.returncode == 2 and f"in use by process {job.pid} on" in refused.stderr, refused.stderr
    refused = command("submit", recipe, "--run", run, "--resume", "--site", "lab")
    assert refused.returncode == 2 and f"in use by process {job.pid} on" in refused.stderr, refused.stderr
    assert {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in run.rglob("*")} == before
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    done = len(steps(run)) + 5
    again = command("train", recipe, "--run", run, "--resume", "--set", f"train.max_steps={done}")
    assert again.returncode == 0, again.stderr
    assert steps(run) == list(range(done)) and not (run / "owner.json").exists()
