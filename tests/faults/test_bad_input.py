"""Bad input: exit code 2, one message that names key and value, before any step, nothing lost."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import changed, command, train_on, write_images, write_recipe


def refused(result, *says):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("hpc-lbsgd: ")]
    assert len(lines) == 1, result.stderr
    for words in says:
        assert words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "setting, says",
    [
        ("optim.lr=1", ["unknown key optim.lr", "allowed here: name, base_lr"]),
        ("optim.base_lr=-1", ["optim.base_lr = -1"]),
        ("optim.base_lr=.nan", ["optim.base_lr = nan"]),
        ("batch.samples_per_worker=0", ["batch.samples_per_worker = 0"]),
        ("batch.bn_group=3", ["batch.bn_group = 3 must divide batch.samples_per_worker = 8"]),
        ("data.train=/nowhere/train", ["data.train = /nowhere/train", "no such folder"]),
        ("data.samples=7", ["data.samples = 7", "has 203"]),
        ("data.classes=7", ["data.classes = 7", "has 4"]),
        ("data.image_size=9", ["data.image_size = 9", "another size"]),
        ("model.name=nowhere.module:net", ["model.name = nowhere.module:net", "No module named"]),
    ],
)
def test_wrong_settings(small_recipe, tmp_path, setting, says):
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe)
    refused(command("train", recipe, "--run", tmp_path / "run", "--set", setting), *says)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_message_from_many_ranks(small_recipe, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe)
    refused(train_on(3, recipe, tmp_path / "run", "--set", "optim.momentum=1"), "optim.momentum = 1")
    refused(train_on(3, recipe, tmp_path / "run", "--set", "data.train=/nowhere"), "data.train = /nowhere")
    assert train_on(2, recipe, tmp_path / "run", "--no-such-flag").stderr.count("unrecognized arguments") == 1


def test_other_ranks_leave_after_rank_0_has_spoken():
    """mpirun ends all ranks with the first that ends: one that finds the fault before rank 0 does has to wait."""

    def rank(number):
        place = {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_SIZE": "2"}
        words = [sys.executable, "-m", "hpc_lbsgd.cli", "train", "fashion-mnist", "--set", "seed=-1"]
        return subprocess.Popen(words, env=os.environ | place, stderr=subprocess.PIPE, text=True)

    early, first = rank(1), rank(0)
    assert "seed = -1" in first.communicate(timeout=60)[1]
    assert early.poll() is None
    assert early.communicate(timeout=60)[1] == "" and early.returncode == first.returncode == 2


def test_a_launch_that_mpirun_refuses(small_recipe, tmp_path):
    """One line, and nothing changed: neither a folder for a run that did not start, nor the status of one that did."""
    recipe = write_recipe(tmp_path / "recipe.yaml", changed(small_recipe, train__max_steps=2))
    run = tmp_path / "run"
    for job in (["preflight", recipe], ["train", recipe, "--run", run]):
        refused(command("launch", "--np", 500, "--", *job), "500 ranks, but there are ", "--oversubscribe")
    assert not run.exists()
    assert command("train", recipe, "--run", run).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    refused(command("resume", run, "--np", 500), "500 ranks, but there are ")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    refused(command("bench", "step", "--ranks", 500, "--rounds", 1), "500 ranks, but there are ")


def test_data_that_changed(small_recipe, small_data, tmp_path):
    data = shutil.copytree(small_data, tmp_path / "data")
    recipe = write_recipe(tmp_path / "recipe.yaml", changed(small_recipe, data__train=str(data / "train")))
    victim = data / "train" / "class-1" / "0001.png"
    with open(victim, "ab") as f:
        f.write(b"x")
    refused(command("train", recipe, "--run", tmp_path / "run"), "no longer matches its files", "class-1/0001.png")


def test_a_folder_without_manifest_is_indexed_or_refused(small_recipe, tmp_path):
    root = write_images(tmp_path / "plain", 40, 8)
    short = changed(small_recipe, data__train=str(root), data__eval=None, train__max_steps=1)
    recipe = write_recipe(tmp_path / "recipe.yaml", short)
    assert command("train", recipe, "--run", tmp_path / "run").returncode == 0
    assert (root / "manifest.arrow").exists()
    (root / "manifest.arrow").unlink()
    whole = (root / "class-2" / "0002.png").read_bytes()
    (root / "class-2" / "0002.png").write_bytes(whole[:-20])
    refused(command("train", recipe, "--run", tmp_path / "other"), "1 of 40 images", "class-2/0002.png")
    (root / "class-2" / "0002.png").write_bytes(whole)
    (root / "class-5").mkdir()
    refused(command("train", recipe, "--run", tmp_path / "other"), "class 'class-5' has no images")


def test_runs_are_not_overwritten_nor_mixed(small_recipe, small_data, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", changed(small_recipe, train__max_steps=2))
    run = tmp_path / "run"
    assert command("train", recipe, "--run", run).returncode == 0
    before = (run / "metrics.jsonl").read_bytes()
    refused(command("train", recipe, "--run", run), "a run is there already", "--resume")
    refused(command("train", recipe, "--run", run, "--resume", "--set", "optim.base_lr=0.3"),
            "optim.base_lr = 0.3 (the run has 0.2)")  # fmt: skip
    refused(command("train", recipe, "--run", run, "--resume", "--set", "model.widths=[16,16,32]"), "model.widths")
    refused(command("train", recipe, "--run", run, "--resume", "--set", f"data.train={small_data / 'eval'}",
                    "--set", "data.samples=null"), "not the data that")  # fmt: skip
    assert (run / "metrics.jsonl").read_bytes() == before
    weights = run / "checkpoints" / "step-00000002" / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(command("train", recipe, "--run", run, "--resume"), "no usable checkpoint", "weights.pt is not what was")
    refused(command("train", recipe, "--resume", cwd=tmp_path), "--resume: no run of recipe in runs")
    refused(command("train", recipe, "--run", tmp_path / "rum", "--resume"), f"--resume: no run in {tmp_path / 'rum'}")
    assert not (tmp_path / "rum").exists()


def test_commands_refuse_what_they_cannot_mean(tmp_path):
    refused(command("plan", "goyal-resnet50", "--steps", "5:2"), "--steps 5:2")
    refused(command("data", "order", "--samples", "10", "--workers", "3", "--worker", "3"), "--worker 3")
    refused(command("data", "order", "--samples", "10"), "--workers")
    refused(command("data", "index", tmp_path / "nowhere"), "no such folder")
    refused(command("launch", "--np", "2", "--", "evaluate", "x"), "launch runs `train`, `preflight` or `audit`")
    refused(command("launch", "--np", "2", "--", "train", "goyal-resnet50", "--set", "seed=-1"), "seed = -1")
    for words in (["plan"], ["plan", "x", "--nodes", "0"], ["plan", "x", "--images-per-s", "-1"], ["frobnicate"]):
        result = command(*words)
        assert result.returncode == 2 and "Traceback" not in result.stderr
    (tmp_path / "bad.yaml").write_text("a: [1,")
    refused(command("plan", tmp_path / "bad.yaml"), "not YAML")
    (tmp_path / "list.yaml").write_text("- 1")
    refused(command("plan", tmp_path / "list.yaml"), "expected keys and values")


def test_a_disk_that_refuses(small_recipe, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("not a folder")
        target = tmp_path / "file" / "run"
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        target = tmp_path / "locked" / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe)
    refused(command("train", recipe, "--run", target), "--run", str(target))
