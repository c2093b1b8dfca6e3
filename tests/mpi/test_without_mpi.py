"""A machine without Horovod, mpi4py and mpirun: ranks started by `launch`, by torchrun and with Slurm's variables train
to Horovod's weights.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import changed, command, records, train_on, write_recipe

ABSENT = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "no_mpi"), os.environ.get("PYTHONPATH", "")])}
TRAIN = ("-m", "hpc_lbsgd.cli", "train")


@pytest.fixture(scope="module")
def recipe(small_recipe, tmp_path_factory):
    """The recipe file; `machine.engine` is still to be set."""
    exact = changed(small_recipe, determinism="any-ranks", machine__bucket_mb=0.005, checkpoint__steps=5)
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", exact)


@pytest.fixture(scope="module")
def horovods(recipe, tmp_path_factory):
    """The hash that Horovod's ranks end at."""
    run = tmp_path_factory.mktemp("horovod") / "run"
    result = train_on(2, recipe, run)
    assert result.returncode == 0, result.stderr
    return end_of(run)


def end_of(run):
    return records(run, "end")[-1]["weights_sha256"]


def words(recipe, run, *more):
    return [str(word) for word in (recipe, "--set", "machine.engine=torch", "--run", run, *more)]


def torchrun(ranks, *program, timeout=240):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "--", *program[1:]]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=os.environ | ABSENT)


def begin(program, **env):
    return subprocess.Popen(
        [sys.executable, *program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | ABSENT | env,
    )  # fmt: skip


def launched(ranks, run, until_step, *words):
    """`launch`, begun, and its run at that step or later."""
    process = begin(["-m", "hpc_lbsgd.cli", "launch", "--np", str(ranks), "--", "train", *words])
    end = time.monotonic() + 120
    while not any(r["step"] >= until_step for r in records(run, "step")):
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process


def test_it_is_not_there():
    done = command("train", "fashion-mnist", env=ABSENT)
    assert "No module named 'horovod'" in done.stderr and done.returncode != 0


def test_launch_stops_torchrun_goes_on(recipe, horovods, tmp_path):
    """SIGUSR2 to `launch`, exit code 75, then on under torchrun on three ranks."""
    run = tmp_path / "run"
    slowly = ("--set", "train.callbacks=[pausing:after_each_step]")
    process = launched(2, run, 7, *words(recipe, run, *slowly))
    process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert json.loads((run / "status.json").read_text())["status"] == "stopped"
    result = torchrun(3, *TRAIN, *words(recipe, run, "--resume"))
    assert result.returncode == 0, result.stderr
    assert end_of(run) == horovods
    assert [(s["engine"], s["ranks"]) for s in records(run, "start")] == [("torch", 2), ("torch", 3)]


def test_slurms_variables_are_enough(recipe, horovods, tmp_path):
    """What `srun --mpi=none` tells two tasks; begun on Horovod, gone on with without it."""
    run = tmp_path / "run"
    first = train_on(3, recipe, run, "--set", "train.max_steps=10")
    assert first.returncode == 0, first.stderr
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "nowhere"}  # fmt: skip
    ranks = [
        begin([*TRAIN, *words(recipe, run, "--resume")], **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert end_of(run) == horovods


def test_a_refusal_and_a_killed_rank_through_launch(recipe, tmp_path):
    nowhere = words(recipe, tmp_path / "r", "--set", "data.train=/nowhere")
    refused = command("launch", "--np", "2", "--", "train", *nowhere, env=ABSENT)
    assert refused.returncode == 2 and refused.stderr.count("data.train = /nowhere") == 1, refused.stderr
    run = tmp_path / "run"
    process = launched(3, run, 5, *words(recipe, run, "--set", "train.max_steps=6000", "--set", "train.epochs=4000"))
    pids = [json.loads(path.read_text())["pid"] for path in sorted((run / "heartbeats").glob("rank-*.json"))]
    os.kill(pids[1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert "rank 1 was ended by SIGKILL" in output
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_launch_says_what_it_cannot_do(recipe):
    many = command("launch", "--np", "2", "--hosts", "a,b", "--", "train", *words(recipe, "x"), env=ABSENT)
    assert many.returncode == 2 and "torchrun on every host" in many.stderr


def test_horovod_under_torchrun_is_refused(recipe, tmp_path):
    """It would train once a rank: its MPI knows of one."""
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    refused = command("train", recipe, "--run", tmp_path / "run", env=told)
    assert refused.returncode == 2 and "the launcher started 2 ranks, and MPI knows of 1" in refused.stderr
    assert not (tmp_path / "run").exists()
