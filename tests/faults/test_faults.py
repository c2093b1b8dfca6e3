"""Killed, stopped and refused: what a job does when something goes wrong, on real ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import changed, command, mpirun, mpirun_line, records, train_on, write_recipe

STEPS = 40


class Job:
    """A training job under mpirun that can be hurt."""

    def __init__(self, ranks, recipe, run, *more):
        words = ["-m", "hpc_lbsgd.cli", "train", recipe, "--run", run, *more]
        self.run, self.ranks = run, ranks
        self.process = subprocess.Popen(mpirun_line(ranks, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, start_new_session=True)  # fmt: skip

    def wait_for_step(self, step, timeout=120):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if any(r["step"] >= step for r in records(self.run, "step")):
                return
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.05)
        pytest.fail(f"no step {step} within {timeout} s")

    def pid(self, rank):
        return json.loads((self.run / "heartbeats" / f"rank-{rank:05d}.json").read_text())["pid"]

    def end(self, within):
        """(exit code, output, seconds it took); every rank must be gone."""
        pids = [self.pid(rank) for rank in range(self.ranks)]
        start = time.monotonic()
        try:
            output = self.process.communicate(timeout=within)[0]
        except subprocess.TimeoutExpired:
            there = [p for p in pids if alive(p)]
            os.killpg(self.process.pid, signal.SIGKILL)
            output = self.process.communicate()[0]
            pytest.fail(f"the job was still there after {within} s, of its ranks {there or 'none'}: {output}")
        took = time.monotonic() - start
        assert not [p for p in pids if alive(p)]
        return self.process.returncode, output, took


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def slow_recipe(small_recipe, tmp_path):
    """Writes a checkpoint every 5 steps, and long enough to be hurt on the way."""

    def make(**changes):
        slow = {"train__max_steps": STEPS, "train__epochs": 40, "checkpoint__steps": 5}
        recipe = changed(small_recipe, **slow | changes)
        return write_recipe(tmp_path / "recipe.yaml", recipe)

    return make


def finish(ranks, recipe, run, *more):
    result = train_on(ranks, recipe, run, *more)
    assert result.returncode == 0, result.stdout + result.stderr
    return records(run, "end")[-1]["weights_sha256"]


def assert_no_step_twice_or_missing(run):
    assert [r["step"] for r in records(run, "step")] == list(range(STEPS))


def kill_and_resume(recipe, run, ranks, then_ranks, victim, step):
    job = Job(ranks, recipe, run)
    job.wait_for_step(step)
    os.kill(job.pid(victim), signal.SIGKILL)
    code, output, _ = job.end(within=30)
    assert code != 0, output
    last = max(r["step"] for r in records(run, "checkpoint"))  # on record once it is whole
    digest = finish(then_ranks, recipe, run, "--resume")
    assert_no_step_twice_or_missing(run)
    (event,) = [r for r in records(run, "event") if r["event"] == "resume"]
    assert event["attempt"] == 1 and event["step"] >= last
    assert [s["ranks"] for s in records(run, "start")] == [ranks, then_ranks]
    return digest


@pytest.mark.parametrize("ranks, victim", [(2, 0), (4, 3)])
def test_killed_and_resumed_is_bit_identical(slow_recipe, tmp_path, ranks, victim):
    recipe = slow_recipe(determinism="same-ranks", data__loader="dali")
    whole = finish(ranks, recipe, tmp_path / "whole")
    assert kill_and_resume(recipe, tmp_path / "hurt", ranks, ranks, victim, step=17) == whole


def test_any_ranks_begun_on_two_resumed_on_three(slow_recipe, tmp_path):
    """Through Horovod, through torch.distributed, and begun there and ended here."""
    recipe = slow_recipe(determinism="any-ranks")
    whole = finish(1, recipe, tmp_path / "whole")
    assert kill_and_resume(recipe, tmp_path / "hurt", 2, 3, victim=1, step=17) == whole
    torch_recipe = slow_recipe(determinism="any-ranks", machine__engine="torch")
    assert kill_and_resume(torch_recipe, tmp_path / "hurt-torch", 3, 2, victim=0, step=17) == whole


def test_resumed_on_another_rank_count_agrees_in_float64(slow_recipe, tmp_path):
    recipe = slow_recipe(precision="float64")
    finish(2, recipe, tmp_path / "whole")
    kill_and_resume(recipe, tmp_path / "hurt", 2, 3, victim=1, step=12)
    a, b = (torch.load(tmp_path / r / "checkpoints" / f"step-{STEPS:08d}" / "weights.pt", weights_only=True)
            for r in ("whole", "hurt"))  # fmt: skip
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("engine", ["horovod", "torch"])
def test_a_stopped_rank_is_named_and_ends_the_job(slow_recipe, tmp_path, engine):
    endless = {"train__epochs": 4000, "train__max_steps": 6000}
    recipe = slow_recipe(machine__stall_timeout_s=4.0, machine__engine=engine, **endless)
    job = Job(3, recipe, tmp_path / "run")
    job.wait_for_step(5)
    pid = job.pid(1)
    os.kill(pid, signal.SIGSTOP)
    code, output, took = job.end(within=60)
    assert code != 0
    assert re.search(rf"no step for 4 s .*Stalest: rank 1 on \S+ \(pid {pid}\): no heartbeat", output), output
    assert output.count("Stalest:") == 1
    assert took < 30
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "rank 1" in status["error"] and status["crashed"]


def test_a_checkpoint_may_take_longer_than_a_step(slow_recipe, tmp_path):
    recipe = slow_recipe(machine__stall_timeout_s=5.0, train__max_steps=4, checkpoint__steps=2, data__eval=None)
    result = mpirun(2, "tests/faults/slow_save.py", 9, "train", recipe, "--run", tmp_path / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [r["seconds"] > 9 for r in records(tmp_path / "run", "checkpoint")] == [True, True]


def test_a_signal_stops_at_a_safe_point_and_launch_says_75(slow_recipe, tmp_path):
    """SIGUSR2 to the launcher: all ranks stop after the same step, with a checkpoint; then on to the end."""
    recipe, run = slow_recipe(determinism="any-ranks"), tmp_path / "run"
    line = [sys.executable, "-m", "hpc_lbsgd.cli", "launch", "--np", "2", "--oversubscribe", "--", "train", recipe,
            "--run", run]  # fmt: skip
    process = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not any(r["step"] >= 7 for r in records(run, "step")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped" and (run / "checkpoints" / f"step-{status['step']:08d}").exists()
    assert finish(3, recipe, run, "--resume") == finish(1, recipe, tmp_path / "whole")
    assert_no_step_twice_or_missing(run)


def test_a_stop_file_stops_at_a_safe_point(slow_recipe, tmp_path):
    """For launchers that pass no signals on. The file is gone at the next start."""
    recipe, run = slow_recipe(train__epochs=4000, train__max_steps=6000), tmp_path / "run"
    job = Job(2, recipe, run)
    job.wait_for_step(5)
    (run / "stop").touch()
    code, output, _ = job.end(within=60)
    assert code == 0, output
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped" and (run / "checkpoints" / f"step-{status['step']:08d}").exists()
    again = train_on(1, recipe, run, "--resume", "--set", f"train.max_steps={status['step'] + 3}")
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "status.json").read_text())["status"] == "done" and not (run / "stop").exists()


def test_a_run_can_go_on_past_its_cap(slow_recipe, tmp_path):
    """And with one flag for its first start and all later ones."""
    recipe = slow_recipe(determinism="any-ranks")
    words = ["train", recipe, "--run", tmp_path / "run", "--resume-if-exists"]
    first = command(*words, "--set", "train.max_steps=10")
    assert first.returncode == 0, first.stderr
    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert_no_step_twice_or_missing(tmp_path / "run")
    before = [records(tmp_path / "run", kind) for kind in ("eval", "step")]
    finished = command(*words)  # there is nothing left to do, and nothing is written twice
    assert finished.returncode == 0, finished.stderr
    assert [records(tmp_path / "run", kind) for kind in ("eval", "step")] == before
    accuracies = [r["accuracy"] for r in (before[0][-1], records(tmp_path / "run", "end")[-1])]
    assert accuracies[0] == accuracies[1] and "test accuracy" in finished.stderr
    whole = command("train", recipe, "--run", tmp_path / "whole")
    assert whole.returncode == 0
    ends = [records(tmp_path / r, "end")[-1]["weights_sha256"] for r in ("run", "whole")]
    assert ends[0] == ends[1]


def test_a_non_finite_loss_ends_the_run_by_name(slow_recipe, tmp_path):
    recipe = slow_recipe(optim__base_lr=1e30, schedule__warmup="none", checkpoint__steps=1)
    result = train_on(2, recipe, tmp_path / "run")
    assert result.returncode != 0
    found = re.search(r"step (\d+) \(epoch \d+\): loss or gradient is not finite, on (.*?)\. The step was not taken; "
                      r"last good checkpoint: (\S+)\.", result.stderr)  # fmt: skip
    assert found, result.stderr
    assert re.search(r"rank \d on \S+|2 ranks|the sum over ranks", found.group(2))
    assert found.group(3).endswith(f"step-{int(found.group(1)):08d}")
    assert result.stderr.count("is not finite") == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "not finite" in status["error"]
    weights = torch.load(os.path.join(found.group(3), "weights.pt"), weights_only=True)
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


def test_a_rank_that_raises_ends_all_and_is_named(slow_recipe, small_data, tmp_path):
    """An image that changes under way: the rank that draws it says so, everybody ends."""
    data = shutil.copytree(small_data, tmp_path / "data")
    recipe = slow_recipe(data__train=str(data / "train"), data__eval=None, train__epochs=4000, train__max_steps=6000)
    job = Job(3, recipe, tmp_path / "run")
    job.wait_for_step(5)
    victim = data / "train" / "class-1" / "0001.png"
    victim.write_bytes(b"\0" * victim.stat().st_size)
    code, output, took = job.end(within=60)
    assert code != 0 and took < 30
    assert re.search(r"rank \d on \S+: .*class-1/0001.png: cannot be decoded", output), output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed" and "0001.png" in status["error"] and "rank" in status


DIES = """
import os, torch
from torch import nn

class Dies(nn.Module):
    def forward(self, x):
        if self.training and os.environ.get("OMPI_COMM_WORLD_RANK") == "1" and os.path.exists("now"):
            os._exit(2)
        return x

def model(channels, classes):
    return nn.Sequential(Dies(), nn.Flatten(), nn.Linear(channels * 64, classes))
"""


def test_a_rank_that_ends_without_a_word_leaves_a_status(slow_recipe, tmp_path):
    """With the very code that a refusal has."""
    (tmp_path / "dies.py").write_text(DIES)
    recipe = slow_recipe(model={"name": "dies:model"}, train__max_steps=100000, train__epochs=100000, data__eval=None)
    line = [sys.executable, "-m", "hpc_lbsgd.cli", "launch", "--np", "2", "--oversubscribe", "--", "train", recipe,
            "--run", "run"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": f"{os.getcwd()}:{tmp_path}"}
    job = subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    end = time.monotonic() + 120
    while not records(tmp_path / "run", "step") and time.monotonic() < end:
        time.sleep(0.05)
    (tmp_path / "now").touch()
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 1 and "a rank was killed or crashed; continue with --resume" in said, said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_one_message_and_nothing_is_cut_short(slow_recipe, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounts are not permitted here")
    try:
        recipe = slow_recipe(train__max_steps=100000, train__epochs=100000, data__eval=None, checkpoint__steps=None)
        line = [sys.executable, "-m", "hpc_lbsgd.cli", "train", recipe, "--run", disk / "run"]
        job = subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while not records(disk / "run", "step") and time.monotonic() < end:
            time.sleep(0.05)
        with open(disk / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError):
            for size in (4096, 512, 1):
                while True:
                    ballast.write(b"0" * size)
        said = job.communicate(timeout=60)[1]
        assert job.returncode == 1, said
        assert "Traceback" not in said and said.count("metrics.jsonl cannot be written: No space left") == 1, said
        assert (disk / "run" / "metrics.jsonl").read_bytes().endswith(b"}\n")
        status = disk / "run" / "status.json"
        assert not status.exists() or json.loads(status.read_text())["status"] == "failed"
        (disk / "ballast").unlink()
        steps = len(records(disk / "run", "step"))
        assert steps and command(*line[3:], "--resume", "--set", "train.max_steps=3").returncode == 0
    finally:
        subprocess.run(["umount", "-l", disk])


def test_a_rank_with_other_weights_is_caught(tmp_path):
    result = mpirun(3, "tests/faults/corrupt_rank.py")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("caught") == 3
