"""`reproduce`: real runs side by side, stopped half way and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import CLASSES, SAMPLES, command

TABLE = ["reproduce", "goyal-table1", "--seeds", "1", "--jobs", "2"]


@pytest.fixture
def settings(small_data):
    """The small scale's recipe on 203 pictures of 8 pixels."""
    keys = {"data.train": small_data / "train", "data.eval": small_data / "eval", "data.samples": SAMPLES,
            "data.classes": CLASSES, "data.image_size": 8, "model.widths": "[16,16,16]", "model.stem": "plain",
            "batch.samples_per_worker": 2, "schedule.milestones": "[4]", "train.epochs": 6}  # fmt: skip
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def finished(out):
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("cells/*/status.json")
            if json.loads(p.read_text())["status"] == "done"}  # fmt: skip


def test_a_stopped_table_goes_on_and_runs_nothing_twice(settings, tmp_path):
    out = tmp_path / "out"
    words = [*TABLE, *settings, "--out", str(out)]
    job = subprocess.Popen(
        [sys.executable, "-m", "hpc_lbsgd.cli", *words], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    end = time.monotonic() + 120
    while not finished(out) and time.monotonic() < end:
        time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    said = job.communicate(timeout=90)[1]
    first = finished(out)
    assert first, said
    if len(first) < 4:
        assert job.returncode == 75 and f"stopped with {len(first)} of 4 runs finished" in said
    again = command(*words, "--json", timeout=200)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert [x["label"] for x in report["lines"]] == [
        "baseline", "no warm-up", "constant warm-up", "gradual warm-up"]  # fmt: skip
    assert all(0 <= x["error"] <= 100 and x["runs"] == 1 for x in report["lines"])
    assert {name: finished(out)[name] for name in first} == first  # not run again
    assert len(finished(out)) == 4
    page = (out / "goyal-table1.md").read_text()
    assert "24.84 ± 0.37" in page and (out / "goyal-table1.png").stat().st_size > 10_000
    listed = json.loads(command(*words, "--list", "--json").stdout)["runs"]
    assert all(x["finished"] for x in listed)


def test_a_run_that_fails_is_named_with_its_log(settings, tmp_path):
    out = tmp_path / "out"
    job = command(*TABLE, *settings, "--set", "model.name=nowhere:model", "--out", out)
    assert job.returncode == 1 and "seed 0: train ended with 2" in job.stderr and ".log" in job.stderr
    logs = "".join(p.read_text() for p in out.glob("cells/*.log"))
    assert "nowhere" in logs


def test_data_that_is_not_there_is_said_once(tmp_path):
    job = command("reproduce", "goyal-table1", "--scale", "cifar10", cwd=tmp_path)
    assert job.returncode == 2 and "data/cifar10/train" in job.stderr and not (tmp_path / "runs").exists()
