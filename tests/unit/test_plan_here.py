"""`plan` without a word about a machine is of this one: its GPUs, else its cores, at a rate measured on them."""

import json
import os
import shlex
import socket

import pytest
from conftest import changed

from hpc_lbsgd import cli
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.records import RunFolder

CORES = 3
GPU = "GPU {}: NVIDIA H100 (UUID: GPU-{}f)"
NVIDIA_SMI = "#!/bin/sh\ncat <<'END'\n{}\nEND\nexit {}\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Three cores, and no GPU until nvidia-smi is told to list some; an empty folder to be in."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def lists(*lines, code=0):
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text(NVIDIA_SMI.format("\n".join(lines), code))
        program.chmod(0o755)

    lists("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lists


@pytest.fixture
def plan(capsys):
    def planned(*words):
        code = cli.main(["plan", *map(str, words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out) if "--json" in words else out

    return planned


def test_a_machine_without_gpus_is_planned_for_its_cores_and_no_gpus_hours(machine, plan):
    found = plan("goyal-resnet50", "--json")
    assert (found["nodes"], found["ranks"], found["workers"], found["here"]) == (1, CORES, CORES, "cpu")
    assert (found["images_per_s_per_rank"], found["required_gbit_per_s"]) == (None, None)
    assert [(j["nodes"], j["ranks"], j["hours"], j["node_hours"]) for j in found["jobs"]] == [(1, CORES, None, None)]
    text = plan("goyal-resnet50", "--set", "batch.workers=6")
    assert f"here           {CORES} cores, no GPU: a rank a core" in text and "--nodes" in text
    assert "A100" not in text and "GPUs" not in text and "hours" not in text and "Gbit" not in text
    (line,) = (line.strip() for line in text.splitlines() if "hpc-lbsgd launch" in line)
    words = shlex.split(line)[1:]
    args = cli.parser().parse_args(words)
    inner = cli.parser().parse_args([word for word in args.job if word != "--"])
    assert (args.ranks, inner.recipe) == (CORES, "goyal-resnet50")
    assert inner.settings == ["batch.workers=6", "train.max_steps=20"]


def test_gpus_are_counted_as_a_run_would_find_them(machine, plan, monkeypatch):
    machine(
        GPU.format(0, 0), "  MIG 1g.10gb Device 0: (UUID: MIG-1)", GPU.format(1, 1), GPU.format(2, 2), GPU.format(3, 3)
    )
    found = plan("goyal-resnet50", "--json")
    assert (found["ranks"], found["workers"], found["here"]) == (4, 4, "cuda")
    assert found["images_per_s_assumed"] and found["jobs"][0]["hours"] > 0
    text = plan("goyal-resnet50")
    assert "here           4 GPUs: a rank a GPU" in text and "assumed: an A100's" in text and "compute only" in text
    for visible, ranks, device in (("0,2", 2, "cuda"), ("GPU-1f", 1, "cuda"), ("", CORES, "cpu"), ("-1", CORES, "cpu")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = plan("goyal-resnet50", "--json")
        assert (found["ranks"], found["here"]) == (ranks, device), visible


@pytest.mark.parametrize(
    "words, nodes, per_node",
    [
        (["--nodes", 32], 32, 8),
        (["--gpus-per-node", 2], 1, 2),
        (["--nodes", 1], 1, 8),
        (["--system", "a100-hdr"], 1, 8),
    ],
)
def test_a_machine_that_is_named_is_planned_wherever_it_is_asked(machine, plan, words, nodes, per_node):
    found = plan("goyal-resnet50", *words, "--json")
    assert (found["nodes"], found["gpus_per_node"], found["here"]) == (nodes, per_node, None)
    assert found["images_per_s_assumed"] and found["images_per_s_per_rank"] > 1000 and len(found["jobs"]) == 6
    text = plan("goyal-resnet50", *words)
    assert f"{nodes} of {per_node} GPUs" in text and "as a job (compute only)" in text and "here  " not in text


def test_a_rate_that_is_given_is_taken_here_too(machine, plan):
    found = plan("goyal-resnet50", "--images-per-s", 10, "--json")
    assert found["ranks"] == CORES and not found["images_per_s_assumed"]
    assert found["jobs"][0]["hours"] == pytest.approx(found["steps"] * 3.2 / 3600)


# ---------------------------------------------------------------- a run on record


SETTINGS = ["data.samples=400", "batch.workers=5", "batch.samples_per_worker=8"]
RECIPE = recipes.read("fashion-mnist", SETTINGS).model_dump(mode="json")  # its layers are known without torch


def record(name, ranks=CORES, host=None, device="cpu", recipe=RECIPE, images_per_s=100.0):
    """A run of 20 steps, as a run leaves it: its first steps are slow."""
    folder = RunFolder(f"runs/{name}")
    folder.path.mkdir(parents=True)
    folder.recipe.write_text(recipes.validate(recipe).to_yaml())
    host = host or socket.gethostname()
    folder.environment.write_text(json.dumps([{"attempt": 0, "ranks": [{"host": host, "device": device}] * ranks}]))
    start = {"kind": "start", "step": 0, "attempt": 0, "ranks": ranks, "device": device, "engine": "torch"}
    times = {
        "loss": 1.0,
        "lr": 0.1,
        "global_batch": 40,
        "samples": 40,
        "step_s": 0.4,
        "data_wait_s": 0,
        "exposed_comm_s": 0,
    }
    steps = [
        times | {"kind": "step", "step": i, "epoch": 0, "images_per_s": images_per_s if i > 9 else 1.0}
        for i in range(20)
    ]
    stamped = (json.dumps({"time": "2026-01-01T00:00:00.000+00:00", **line}) for line in [start, *steps])
    folder.metrics.write_text("\n".join(stamped) + "\n")
    return folder


@pytest.fixture
def own(machine, tmp_path):
    path = tmp_path / "here" / "own.yaml"
    path.write_text(json.dumps(RECIPE))
    return path


def test_a_run_on_record_says_how_long_it_takes_here(own, plan):
    """5 workers on 3 ranks: two of them on the busiest, which all wait for."""
    record("first")
    found = plan(own, "--json")
    assert found["images_per_s_of"] == "runs/first" and not found["images_per_s_assumed"]
    assert found["jobs"][0]["hours"] * 3600 == pytest.approx(found["steps"] * 40 / 100.0)
    faster = plan(own, "--set", "optim.base_lr=0.01", "--set", "train.epochs=90", "--set", "seed=7")
    assert "time           0:06:00 at 40 images/s a rank (as runs/first went here; data and sums in it" in faster
    assert "not known" not in faster
    os.utime(record("newer", images_per_s=200.0).metrics, (2**31, 2**31))
    assert plan(own, "--json")["images_per_s_of"] == "runs/newer"


def test_a_run_of_other_work_or_another_machine_says_nothing(own, plan):
    record("two", ranks=2)
    record("elsewhere", host="elsewhere")
    record("gpus", device="cuda:0 NVIDIA H100")
    record("model", recipe=changed(RECIPE, model__widths=[8, 8, 8]))
    record("size", recipe=changed(RECIPE, batch__samples_per_worker=16))
    record("no-steps").metrics.write_text("")
    record("cut").metrics.write_text('{"kind": "step", "step": 3, "images_per_s": "fast"}\n{"kind": "st')
    record("no-recipe").recipe.write_text("model: [")
    record("deep").environment.write_text("[" * 200_000)
    begun = record("begun-again-on-these").metrics  # and its record of that has not come so far
    begun.write_text(begun.read_text().replace(f'"ranks": {CORES}', '"ranks": 1'))
    record("no-ranks").environment.write_text('[{"ranks": [1, 2, 3]}]')
    (own.parent / "runs" / "a file").write_text("")
    found = plan(own, "--json")
    assert (found["images_per_s_of"], found["images_per_s_per_rank"]) == (None, None)


def test_a_run_that_is_planned_is_on_record_wherever_it_lies(own, plan, tmp_path):
    folder = record("first")
    folder.path.rename(tmp_path / "moved")
    assert plan(tmp_path / "moved", "--json")["images_per_s_of"] == str(tmp_path / "moved")
    assert plan(own, "--json")["images_per_s_of"] is None


def test_batches_are_told_on_a_machine_with_more_cores_than_they_have_workers(machine, plan, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    found = plan("fashion-mnist", "--critical-batch", 60, "--json")
    assert [b["global_batch"] for b in found["batches"]][:3] == [32, 64, 128] and found["recommended_batch"] == 32
    assert {b["hours"] for b in found["batches"]} == {None}
    assert "<- recommended" in plan("fashion-mnist", "--critical-batch", 60)
    assert plan("fashion-mnist", "--critical-batch", 0.1, "--json")["recommended_batch"] == 32  # was an IndexError
