"""docs/quick-start.md, as it is written, on sets, models and ranks that are small. Elsewhere: `doctor`
(tests/unit/test_doctor.py), `data fetch` (test_fashion_mnist.py), jobs that are submitted (tests/slurm)."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from conftest import command, records, write_images

from hpc_lbsgd import cli
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.records import RunFolder

PAGE = (Path(__file__).parents[2] / "docs" / "quick-start.md").read_text()
LAPTOP, PROMISE, NODE, CLUSTER = (block.splitlines() for block in re.findall(r"```sh\n(.+?)```", PAGE, re.S))
FEW = {"data.samples": 240, "model.widths": "[8,8,8]", "train.epochs": 1, "batch.samples_per_worker": 4}
SMALL = {"data.samples": 96, "data.classes": 4, "data.image_size": 32, "data.eval_resize": 36, "train.epochs": 1,
         "model.name": "resnet8", "batch.samples_per_worker": 8, "schedule.warmup_epochs": 0,
         "schedule.milestones": "[]"}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick-start")
    for part, samples, seed in (("train", 240, 1), ("test", 40, 2)):
        trees.index(write_images(folder / "data/fashion-mnist" / part, samples, 28, 10, seed=seed), processes=1)
    for part, samples in (("train", 96), ("val", 24)):
        write_images(folder / "data/imagenet" / part, samples, 48, suffix=".jpg")
    (folder / "my-site.yaml").write_text(yaml.safe_dump({"partition": "gpu", "gpus_per_node": 8}))
    return folder


def follow(here, lines, recipe, small):
    """The lines' commands, in order; what each printed."""
    said = []
    for line in lines:
        words = line.split()
        assert words.pop(0) == "hpc-lbsgd"
        if recipe in words:
            words += [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
        if words[0] == "launch":
            words[words.index("--np") + 1] = "2"
            words.insert(1, "--oversubscribe")
        done = command(*words, *(["--steps", "2"] if words[:2] == ["bench", "rates"] else []), cwd=here)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        said.append(done.stdout + done.stderr)
    return said


def test_a_laptop(here, monkeypatch, capsys):
    assert [line.split()[1] for line in LAPTOP[:2]] == ["doctor", "data"]
    plan, *_, page = follow(here, LAPTOP[2:], "fashion-mnist", FEW)
    assert "kn = 64" in plan and "not known: no run of this work" in plan
    assert Path(here / "runs/first/report.html").exists()
    settings = [word for key, value in FEW.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.chdir(here)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})  # as many cores as there were ranks
    assert cli.main(["plan", "fashion-mnist", *settings]) == 0
    assert "images/s a rank (as runs/first went here; data and sums in it" in capsys.readouterr().out
    assert "report.html" in page and RunFolder(here / "runs/first").status()["status"] == "done"


def test_the_promise_in_three_commands(here):
    *_, told = follow(here, PROMISE, "fashion-mnist", FEW)
    one, two = ([(r["step"], r["loss"]) for r in records(here / f"runs/{name}", "step")] for name in ("one", "two"))
    assert one == two and [r["ranks"] for r in records(here / "runs/two", "start")] == [2]
    found = json.loads(command("compare", "runs/one", "runs/two", "--json", cwd=here).stdout)
    assert found["weights"] and all(row["equal"] for row in found["weights"]), told


def test_a_node(here):
    *_, watched = follow(here, NODE, "goyal-resnet50", SMALL)
    run = here / "runs/resnet50"
    assert "done" in watched and {r["global_batch"] for r in records(run, "step")} == {16}  # n = 8 on two ranks


def test_a_cluster(here):
    plan, script = follow(here, CLUSTER[:2], "goyal-resnet50", {"data.samples": 96, "batch.samples_per_worker": 1})
    assert "kn = 32" in plan and "#SBATCH --nodes=4" in script
    assert CLUSTER[2] == CLUSTER[1].removesuffix(" --dry-run") and CLUSTER[3].split()[-1] in CLUSTER[2].split()
