"""docs/own-images.md, as it is written: from a folder of pictures to a model that answers, with a Ctrl-C on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import command, write_images

from hpc_lbsgd import cli
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.report.compare import compare
from hpc_lbsgd.train import start

PAGE = (Path(__file__).parents[2] / "docs" / "own-images.md").read_text()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The page's commands done in order, in one folder: {first word: what it printed}."""
    here = tmp_path_factory.mktemp("first-hour")
    write_images(here / "photos", 160, 40)
    write_images(here / "new-photos", 8, 40, seed=5)
    (here / "new-photos" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    lines = [line.split()[1:] for line in re.search(r"```sh\n(.+?)```", PAGE, re.S)[1].splitlines()]
    assert [words[0] for words in lines] == ["init", "plan", "launch", "resume", "evaluate", "predict", "export"]
    said = {"folder": here}
    for words in lines:
        if words[0] == "launch":
            stop_when_it_trains(here, [*words, "--set", "train.epochs=16", "--set", "schedule.milestones=[8,12,14]"])
            continue
        done = command(*words, *(["--json"] if words[0] in ("evaluate", "predict", "export") else []), cwd=here)
        assert done.returncode == (1 if words[0] == "predict" else 0), done.stderr
        said[words[0]] = done.stdout
    return said


def stop_when_it_trains(here: Path, words: list[str]) -> None:
    line = [sys.executable, "-m", "hpc_lbsgd.cli", *words]
    line.insert(line.index("--np"), "--oversubscribe")
    process = subprocess.Popen(line, cwd=here, stderr=subprocess.PIPE, text=True, preexec_fn=listens_to_ctrl_c)
    try:
        metrics = here / "runs" / "photos" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not any(r["kind"] == "eval" for r in read_metrics(metrics)) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=200) == 75, process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def listens_to_ctrl_c():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job does not


def test_the_first_hour(told):
    here = told["folder"]
    assert "written" in told["init"] and "kn = 8" in told["plan"]
    run = RunFolder(here / "runs" / "photos")
    records = list(read_metrics(run.metrics))
    assert run.status()["status"] == "done" and [r["kind"] for r in records].count("start") == 2
    last = [r for r in records if r["kind"] == "eval"][-1]
    evaluated = json.loads(told["evaluate"])
    assert {k: evaluated[k] for k in ("loss", "accuracy", "step")} == {k: last[k] for k in ("loss", "accuracy", "step")}
    assert last["accuracy"] > 0.5

    predicted = json.loads(told["predict"])["images"]
    bad = [p for p in predicted if p["problem"]]
    assert len(predicted) == 9 and [Path(p["path"]).name for p in bad] == ["torn.jpg"]
    right = [p for p in predicted if p["classes"] and p["classes"][0] == Path(p["path"]).parent.name]
    assert len(right) >= 4
    assert all(
        len(p["classes"]) == 3 and p["shares"] == sorted(p["shares"], reverse=True) for p in predicted if p not in bad
    )

    exported = json.loads(told["export"])
    assert (here / "photos.onnx").stat().st_size == exported["bytes"] and exported["largest_difference"] < 1e-3


def test_every_format_holds_the_run_s_weights(told, monkeypatch, capsys):
    monkeypatch.chdir(told["folder"])
    for name in ("photos.pt", "photos.safetensors", "photos.pt2"):
        assert cli.main(["export", "runs/photos", "--out", name]) == 0
    assert capsys.readouterr().err == ""
    from safetensors import safe_open

    own = torch.load("photos.pt", weights_only=True)
    with safe_open("photos.safetensors", "pt") as file:
        assert set(file.keys()) == set(own)
        assert json.loads(file.metadata()["classes"]) == [f"class-{i}" for i in range(4)]
        assert all(torch.equal(file.get_tensor(name), own[name]) for name in own)
    assert cli.main(["export", "runs/photos", "--out", "photos.pt"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_run_starts_from_another_s_weights(told, monkeypatch):
    here = told["folder"]
    monkeypatch.chdir(here)
    write_images(here / "two", 40, 40, classes=2, seed=9)
    assert cli.main(["init", "two"]) == 0
    few = ["--set", "train.max_steps=1", "--set", "machine.engine=torch", "--set", "optim.base_lr=1e-9"]
    done = command("train", "two.yaml", "--run", "tuned", "--set", "model.init_from=runs/photos", *few, cwd=here)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(Path("tuned/recipe.yaml").read_text())["model"]["init_from"].endswith("weights.pt")
    old = start.read(newest())
    new = torch.load("tuned/checkpoints/step-00000001/weights.pt", weights_only=True)
    assert old["fc.weight"].shape != new["fc.weight"].shape
    for name in old:
        if name.endswith("weight") and name != "fc.weight":
            assert torch.allclose(old[name], new[name], atol=1e-6), name
    found = compare("runs/photos", "tuned")
    Path("runs").rename("elsewhere")  # a resume has all in its checkpoint
    more = command("train", "two.yaml", "--run", "tuned", "--resume", *few, cwd=here)
    Path("elsewhere").rename("runs")
    assert more.returncode == 0 and "weights.pt: gone" in more.stderr, more.stderr
    assert found["recipe"]["train.max_steps"] == [None, 1] and found["first_difference"]["step"] == 0


def newest() -> str:
    step = Path("runs/photos/checkpoints/LATEST").read_text().strip()
    return f"runs/photos/checkpoints/{step}/weights.pt"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"fc.weight": torch.zeros(2, 64)}, "of another model (missing fc.bias"),
        ({"fc.weight": torch.zeros(2, 63), "fc.bias": torch.zeros(2)}, "only one layer, the classifier, may differ"),
        ({"fc.weight": torch.zeros(2, 64), "fc.bias": "text"}, "not a state dict"),
        (None, "neither torch's nor safetensors'"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, content, said):
    path = tmp_path / "weights.pt"
    path.write_text("none") if content is None else torch.save({"state_dict": content}, path)
    with pytest.raises(RequestError, match=re.escape(said)):
        start.load_into(torch.nn.ModuleDict({"fc": torch.nn.Linear(64, 4)}), str(path))


def test_a_run_is_equal_to_itself_to_the_last_digit(told, monkeypatch):
    monkeypatch.chdir(told["folder"])
    same = compare("runs/photos", "runs/photos")
    assert same["first_difference"] is None and same["recipe"] == same["start"] == {}
    assert all(row["equal"] for row in same["weights"]) and same["weights"]


@pytest.mark.parametrize(
    "words",
    [
        "evaluate photos",
        "predict photos new-photos",
        "predict runs/photos nowhere",
        "export photos --out x.pt",
        "export runs/photos --out x.h5",
        "resume photos",
        "compare photos runs/photos",
        "evaluate runs/photos --at 7",
        "evaluate runs/photos two",
    ],
)
def test_what_cannot_be_is_refused_in_one_line(told, monkeypatch, capsys, words):
    monkeypatch.chdir(told["folder"])
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and set(words.split()) & set(re.split(r"[ :,]", said)), said
    assert os.listdir("runs") == ["photos"]
