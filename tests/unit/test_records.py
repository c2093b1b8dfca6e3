"""Run folders: records, cutting back, checkpoints whole or not at all."""

import errno
import json
import os
import shutil
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from conftest import changed

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.records import Metrics, RunFolder, cut_metrics, json_line, read_metrics, whole
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.prepare import data_fingerprint, prepare
from hpc_lbsgd.train.replica import Replica, weights_sha256

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def test_cutting_back_loses_no_line_and_doubles_none(folder):
    metrics = Metrics(folder)
    metrics.write("start", step=0)
    for step in range(6):
        metrics.write("step", step=step, loss=1.0)
        if step == 2:
            metrics.write("eval", step=3, accuracy=0.5)
            metrics.write("checkpoint", step=3)
    metrics.write("end", step=6)
    metrics.close()
    with open(folder.metrics, "a") as f:
        f.write('{"kind": "step", "step": 6, "lo')  # what a kill leaves
    assert cut_metrics(folder, 3) == 4
    kept = [(r["kind"], r["step"]) for r in read_metrics(folder.metrics)]
    assert kept == [("start", 0), ("step", 0), ("step", 1), ("step", 2), ("eval", 3), ("checkpoint", 3)]
    assert [r["step"] for r in read_metrics(folder.lost)] == [3, 4, 5, 6]


def test_records_are_strict_json(folder):
    metrics = Metrics(folder)
    metrics.write("step", step=0, loss=float("nan"), lr=0.1)
    metrics.close()
    (line,) = folder.metrics.read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["loss"] is None


def test_the_first_failure_keeps_its_place(folder):
    folder.claim_failure(rank=3, error="first")
    folder.claim_failure(rank=0, error="second")
    assert (folder.status()["status"], folder.status()["error"]) == ("failed", "first")


def make_replica(**model):
    recipe = recipes.validate({"data": {"channels": 1, "mean": [0.0], "std": [1.0]},
                               "model": {"name": "resnet8", "widths": [4, 4, 4], **model}})  # fmt: skip
    return Replica(recipe, 3, engines.create(recipe.machine, "off", CPU), CPU)


def state(step, **more):
    return checkpoint.State(step, "recipe", "data", **more)


def test_round_trip_keeps_every_bit(folder):
    replica, other = make_replica(), make_replica()
    with torch.no_grad():
        for tensor in [*replica.model.state_dict().values(), *replica.optimizer.flats["momentum"]]:
            if tensor.is_floating_point():
                tensor.uniform_(-1, 1)
    checkpoint.save(folder, replica, state(5), keep=2)
    path, found, problems = checkpoint.find_newest(folder)
    assert found.step == 5 and not problems
    checkpoint.load(path, other)
    assert weights_sha256(other.model) == weights_sha256(replica.model) == found.weights_sha256
    assert (folder.checkpoints / "LATEST").read_text().strip() == path.name
    for (name, a), b in zip(replica.optimizer.state()["momentum"].items(),
                            other.optimizer.state()["momentum"].values(), strict=True):  # fmt: skip
        assert torch.equal(a, b), name


def test_last_and_best_are_kept(folder):
    replica = make_replica()
    for step in range(1, 7):
        checkpoint.save(folder, replica, state(step, best_step=2), keep=2)
    assert checkpoint.steps_there(folder.checkpoints) == [2, 5, 6]
    assert not [p for p in os.listdir(folder.checkpoints) if p.startswith(".")]


def test_torn_checkpoints_and_other_folders_count_for_nothing(folder):
    """With keep = 1 the only good one must not go because a torn one is newer; a person's copies are a person's."""
    replica = make_replica()
    checkpoint.save(folder, replica, state(3), keep=1)
    good = folder.checkpoints / "step-00000003"
    shutil.copytree(good, folder.checkpoints / "step-3-keep")
    copies = {"step-00000009": "weights.pt", "step-00000008": "state.json", "step-00000007": "", "step-00000002": ""}
    for name, harm in copies.items():  # 7: whole, but of step 3; no resume takes it
        shutil.copytree(good, folder.checkpoints / name)
        if harm:
            os.truncate(folder.checkpoints / name / harm, 9)
    assert checkpoint.steps_there(folder.checkpoints) == [2, 3, 7, 8, 9]
    checkpoint.prune(folder.checkpoints, 1, None)
    assert checkpoint.steps_there(folder.checkpoints) == [3, 7, 8, 9] and checkpoint.find_newest(folder)[0] == good
    checkpoint.save(folder, replica, state(4), keep=1)
    assert checkpoint.steps_there(folder.checkpoints) == [4, 7, 8, 9] and checkpoint.find_newest(folder)[1].step == 4
    assert (folder.checkpoints / "step-3-keep" / "weights.pt").exists()


def test_a_damaged_checkpoint_is_passed_over_and_named(folder):
    replica = make_replica()
    for step in (1, 2, 3):
        checkpoint.save(folder, replica, state(step), keep=9)
    weights = folder.checkpoints / "step-00000003" / "weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (folder.checkpoints / "step-00000002" / "optimizer.pt").unlink()
    path, found, problems = checkpoint.find_newest(folder)
    assert found.step == 1
    assert "step-00000003: weights.pt is not what was written" in problems[0] and "step-00000002" in problems[1]
    (path / "state.json").write_text("{")
    with pytest.raises(RequestError, match="no usable checkpoint"):
        checkpoint.find_newest(folder)


def test_a_write_that_fails_leaves_the_old_one(folder, monkeypatch):
    replica = make_replica()
    checkpoint.save(folder, replica, state(1), keep=2)

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(Exception, match="checkpoint at step 2 not written: .*No space left"):
        checkpoint.save(folder, replica, state(2), keep=2)
    monkeypatch.undo()
    assert checkpoint.find_newest(folder)[1].step == 1
    assert sorted(os.listdir(folder.checkpoints)) == ["LATEST", "step-00000001"]


def test_killed_writers_leave_nothing_that_counts(folder):
    replica = make_replica()
    checkpoint.save(folder, replica, state(1), keep=2)
    (folder.checkpoints / ".step-00000002.77").mkdir()
    (folder.checkpoints / ".old.step-00000000").mkdir()
    assert checkpoint.find_newest(folder)[1].step == 1
    checkpoint.sweep(folder)
    assert sorted(os.listdir(folder.checkpoints)) == ["LATEST", "step-00000001"]


def test_another_models_checkpoint_is_refused(folder):
    checkpoint.save(folder, make_replica(), state(1), keep=2)
    with pytest.raises(RequestError, match=r"another model .*other shape \['"):
        checkpoint.load(folder.checkpoints / "step-00000001", make_replica(widths=[8, 8, 8]))


def test_loading_runs_no_code(folder):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(folder.path / "trapped"),))

    replica = make_replica()
    path = checkpoint.save(folder, replica, state(1), keep=2)
    torch.save({"fc.weight": Trap()}, path / "weights.pt")
    with pytest.raises(Exception, match="(?i)weights_only|unsupported|unpickl"):
        checkpoint.load(path, replica)
    assert not (folder.path / "trapped").exists()


def test_a_checkpoint_of_other_rules_is_told_apart(folder):
    """Before rules were written down, partial tails counted otherwise: such a run is not gone on with in silence."""
    replica = make_replica()
    checkpoint.save(folder, replica, state(5, rules=checkpoint.RULES), keep=2)
    path, found, _ = checkpoint.find_newest(folder)
    assert found.rules == checkpoint.RULES > 1
    content = json.loads((path / "state.json").read_text())
    del content["rules"], content[checkpoint.SELF]
    (path / "state.json").write_text(json.dumps(content))
    assert checkpoint.find_newest(folder)[1].rules == 1


INT32 = ["determinism=any-ranks", "fixed_point=int32"]


@pytest.mark.parametrize("settings, rules, says", [
    (["batch.last_batch=partial"], 1, "partial tails and averaged weights"), (["batch.last_batch=partial"], 2, None),
    (INT32, 2, "units of int32"), (INT32[:1], 2, None), (INT32, checkpoint.RULES, None),
    ([], checkpoint.RULES + 1, "steps"),
])  # fmt: skip
def test_only_a_recipe_that_other_rules_are_about_is_refused(settings, rules, says):
    recipe = recipes.read("goyal-resnet50", ["batch.last_batch=drop", *settings])
    assert checkpoint.other_rules(recipe, rules) == says


def test_a_record_whose_key_or_time_changed_by_a_bit_is_not_whole(tmp_path):
    """A resume reads the steps of its epoch: one whose key is another's, or whose time is none, is left out there."""
    with closing(Metrics(RunFolder(tmp_path))) as metrics:
        metrics.write("eval", step=3, epoch=1, loss=0.5)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert whole(record) and RunFolder(tmp_path).evaluation(3) == {"loss": 0.5}
    text = json.dumps(record)
    for old, new in (('"step"', '"stdp"'), ('"epoch"', '"dpoch"'), ('"time"', '"tile"'), (record["time"], "20:6-01")):
        (tmp_path / "metrics.jsonl").write_text(text.replace(old, new) + "\n")
        (changed,) = read_metrics(tmp_path / "metrics.jsonl")
        assert not whole(changed) and RunFolder(tmp_path).evaluation(3) == {}


def test_a_run_whose_first_record_is_damaged_is_gone_on_with_as_any(small_recipe, tmp_path):
    """That record said that there was a start: without it steps would be on record twice."""
    recipe, folder = recipes.validate(small_recipe), RunFolder(tmp_path / "run")
    assert prepare(folder, recipe, 1, 1, None, CPU).attempt == 0
    lines = [json_line({"kind": "start", "step": 0})] + [json_line({"kind": "step", "step": i}) for i in range(3)]
    folder.metrics.write_text("".join(["[" + lines[0][1:], *lines[1:]]))
    assert prepare(folder, recipe, 1, 1, None, CPU).attempt == 1
    assert not list(read_metrics(folder.metrics)) and len(list(read_metrics(folder.lost))) == 3


@pytest.mark.parametrize("number, advice", [("ENOSPC", "make room"), ("EROFS", "make the folder writable"),
                                            ("EIO", "see that the file system works again")])  # fmt: skip
def test_a_file_system_that_takes_no_record_is_one_message(folder, number, advice):
    """Also where what was written of a line cannot be taken back."""
    metrics = Metrics(folder)
    metrics.close()

    def fails(_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    place = os.open(folder.metrics, os.O_RDONLY)
    metrics._file = SimpleNamespace(fileno=lambda: place, name="metrics.jsonl", write=fails, truncate=fails)
    with pytest.raises(RunError, match=f"metrics.jsonl cannot be written: .*; {advice} and start again with --resume"):
        metrics.write("event", event="odd")
    os.close(place)


def test_a_runs_recipe_that_was_changed_since_is_no_longer_its(small_recipe, tmp_path):
    """By a person or a disk: a start that takes the run's own copy has nothing else to be held against."""
    folder = RunFolder(tmp_path / "run")
    found = prepare(folder, recipes.validate(small_recipe), 1, 1, None, CPU)
    settled = recipes.validate(found.recipe)
    data = data_fingerprint(Manifest(found.train_set), Manifest(found.eval_set))
    made = checkpoint.State(3, settled.fingerprint(), data, rules=checkpoint.RULES)
    checkpoint.save(folder, make_replica(), made, keep=1)
    for cap in (None, 5):
        again = changed(settled.model_dump(mode="json"), train__max_steps=cap)
        assert prepare(folder, recipes.validate(again), 1, 1, None, CPU).state["step"] == 3
    folder.recipe.write_text(folder.recipe.read_text().replace("base_lr: 0.", "base_lr: 1."))
    with pytest.raises(RequestError, match="step-00000003 was made by another recipe than .*recipe.yaml is now"):
        prepare(folder, recipes.load_resolved(folder.recipe), 1, 1, None, CPU)
