"""`plan` and `data order` as scripts use them: --json, and nothing else on stdout."""

import json

import numpy as np
import pytest
from conftest import command

IMAGENET = 1_281_167


def answer(*words):
    result = command(*words, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16, 32])
def test_goyal_on_1_to_32_nodes_of_8(nodes):
    kn = 256 * nodes
    p = answer("plan", "goyal-resnet50", "--nodes", nodes, "--gpus-per-node", 8)
    assert (p["global_batch"], p["workers"], p["samples_per_worker"], p["ranks"]) == (kn, 8 * nodes, 32, 8 * nodes)
    assert (p["idle_ranks"], p["passes_per_step"]) == (0, 1)
    assert p["peak_lr"] == pytest.approx(0.1 * nodes, rel=1e-15) and p["warmup_start_lr"] == 0.1
    assert p["steps_per_epoch"] == IMAGENET // kn
    assert p["warmup_steps"] == 5 * (IMAGENET // kn)
    assert p["steps"] == 90 * (IMAGENET // kn)
    assert [s["first_step"] for s in p["stages"]] == [e * (IMAGENET // kn) for e in (0, 30, 60, 80)]
    assert p["stages"][-1]["last_step"] == p["steps"] - 1
    assert [s["lr"] for s in p["stages"]] == pytest.approx([0.1 * nodes / 10**i for i in range(4)], rel=1e-15)
    assert p["accumulator_warmin_epochs"] == pytest.approx(kn / (IMAGENET * 0.1))
    assert p["required_gbit_per_s"] > 0


def test_plan_table_and_goyals_bandwidth():
    # 32 images forward and backward in 0.1875 s: 0.125 s of backward
    p = answer("plan", "goyal-resnet50", "--nodes", 32, "--steps", "0:782", "--images-per-s", 32 / 0.1875)
    assert p["required_gbit_per_s"] == pytest.approx(12.8 * 25.557032 / 25, rel=1e-6)
    rows = p["table"]
    assert [r["step"] for r in rows] == list(range(782))
    assert rows[0] == {"step": 0, "epoch": 0, "lr": 0.1, "momentum": 0.9, "global_batch": 8192}
    assert rows[390]["lr"] == pytest.approx(0.1 + 3.1 / 2) and rows[780]["lr"] == 3.2


def test_idle_ranks_are_said():
    p = answer("plan", "goyal-resnet50", "--nodes", 2, "--set", "batch.workers=12")
    assert (p["ranks"], p["workers"], p["idle_ranks"], p["passes_per_step"]) == (16, 12, 4, 1)


@pytest.mark.parametrize("last_batch", ["partial", "drop"])
def test_order_covers_the_epoch(last_batch):
    words = ["data", "order", "--samples", 203, "--workers", 3, "--samples-per-worker", 8, "--seed", 5,
             "--last-batch", last_batch, "--epoch", 4]  # fmt: skip
    found = [answer(*words, "--worker", j) for j in range(3)]
    steps = 9 if last_batch == "partial" else 8
    assert all(len(f["steps"]) == steps for f in found)
    assert all(f["samples"] == [s for step in f["steps"] for s in step] for f in found)
    drawn = np.concatenate([f["samples"] for f in found])
    assert len(set(drawn.tolist())) == len(drawn) == (203 if last_batch == "partial" else 192)
    if last_batch == "partial":
        assert [len(f["steps"][-1]) for f in found] == [8, 3, 0]
    assert answer(*words[:-1], 5, "--worker", 0)["samples"] != found[0]["samples"]


def test_order_of_a_recipe():
    found = answer("data", "order", "fashion-mnist", "--epoch", 1, "--worker", 15)
    assert len(found["steps"]) == 118 and found["workers"] == 16
    assert [len(s) for s in found["steps"]] == [32] * 117 + [0]  # 60,000 = 117 * 512 + 3 * 32


def test_doctor_finds_a_working_environment():
    result = command("doctor", "--json")
    findings = {f["what"]: f for f in json.loads(result.stdout)["findings"]}
    assert result.returncode == 0, findings
    for what in ("python", "mpirun", "mpi4py", "torch", "horovod", "dali"):
        assert findings[what]["level"] == "ok", findings[what]
    assert "mpi" in findings["horovod"]["found"]


def test_launch_prints_its_line():
    result = command("launch", "--np", 16, "--hosts", "a:8,b:8", "--dry-run", "--", "train", "fashion-mnist",
                     "--set", "data.train=a b")  # fmt: skip
    assert result.returncode == 0
    assert " -np 16 " in result.stdout and " --host a:8,b:8 " in result.stdout
    assert "'data.train=a b'" in result.stdout and "--run runs/fashion-mnist-" in result.stdout
