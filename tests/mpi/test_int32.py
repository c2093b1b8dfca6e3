"""Sums in int32 on real ranks: one hash, whichever steps int32 cannot hold, whoever resumes where."""

import os
import shutil

import pytest
from conftest import changed, records, train_many

BASE = {
    "seed": 5,
    "determinism": "any-ranks",
    "fixed_point": "int32",
    "data": {"dataset": "spiky:data"},
    "model": {"name": "spiky:net"},
    "batch": {"samples_per_worker": 4, "workers": 5},  # 121 samples: the tail has one
    "optim": {"base_lr": 0.05, "base_batch": 20, "weight_decay": 0.001},
    "schedule": {"kind": "constant", "warmup": "none"},
    "train": {"epochs": 3, "ema_decay": 0.9, "noise_scale_steps": 3},
    "machine": {"cross_check_steps": 2, "bucket_mb": 0.002, "first_bucket_mb": 0.001},
    "checkpoint": {"steps": 1, "keep": 99},
}
BAD = {"data__dataset": "spiky:with_a_bad_sample", "train__on_bad_step": "skip"}
RECIPES = {"calm": BASE, "bad": changed(BASE, **BAD), "int64": changed(BASE, fixed_point="int64")}


def over(engine, recipes):
    return {name: changed(recipe, machine__engine=engine) for name, recipe in recipes.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(engine, ranks): {recipe: run folder}}"""
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    root = tmp_path_factory.mktemp("int32")
    found = {}
    for engine, ranks in (("horovod", 1), ("horovod", 2), ("horovod", 3), ("torch", 3)):
        where = root / engine
        where.mkdir(exist_ok=True)
        asked = RECIPES if ranks == 1 else {name: RECIPES[name] for name in ("calm", "bad")}
        found[engine, ranks] = train_many(ranks, over(engine, asked), where)
    return found


def end_of(run):
    return records(run, "end")[-1]["weights_sha256"]


def events(run, kind):
    return [{k: v for k, v in r.items() if k != "time"} for r in records(run, "event") if r["event"] == kind]


def test_one_hash_on_any_ranks_and_engine(runs):
    alone = runs["horovod", 1]
    for name in ("calm", "bad"):
        assert len({end_of(found[name]) for found in runs.values()}) == 1
        steps = [[(r["loss"], r.get("noise_scale"), r.get("flushed")) for r in records(found[name], "step")]
                 for found in runs.values()]  # fmt: skip
        assert all(s == steps[0] for s in steps) and len(steps[0]) == 21
        overflows = [events(found[name], "overflow") for found in runs.values()]
        assert all(o == overflows[0] for o in overflows)
        spikes = [e for e in overflows[0] if e["tensor"].startswith("spiky")]
        assert len(spikes) >= 2 and all(e["step"] > 1 for e in spikes)
        assert len(overflows[0]) < 21 / 2  # the others were sent in int32
    assert end_of(alone["int64"]) != end_of(alone["calm"])
    last = [records(alone[name], "step")[-1]["loss"] for name in ("calm", "int64")]
    assert last[0] == pytest.approx(last[1], rel=1e-3)
    evals = [records(alone[name], "eval")[-1]["loss"] for name in ("calm", "int64")]
    assert evals[0] == pytest.approx(evals[1], rel=1e-3)


def test_a_bad_step_is_skipped_without_a_second_try(runs):
    run = runs["horovod", 1]["bad"]
    skipped = {e["step"] for e in events(run, "skipped")}
    assert skipped == {r["step"] for r in records(run, "step") if r.get("skipped")} and len(skipped) == 3
    assert not skipped & {e["step"] for e in events(run, "overflow")}


def test_a_resume_around_an_overflow_changes_nothing(runs, tmp_path):
    """Killed before it, after it, and after a skipped step; gone on with on two ranks, over the other engine."""
    recipes = {}
    for name in ("calm", "bad"):
        run = runs["horovod", 1][name]
        spike = next(e["step"] for e in events(run, "overflow") if e["tensor"].startswith("spiky"))
        steps = [spike, spike + 1] if name == "calm" else [events(run, "skipped")[1]["step"] + 1]
        for step in steps:
            copy = tmp_path / f"{name}-{step}-on-2"
            shutil.copytree(run, copy)
            for path in (copy / "checkpoints").glob("step-*"):
                if int(path.name.removeprefix("step-")) > step:
                    shutil.rmtree(path)
            (copy / "status.json").unlink()
            recipes[f"{name}-{step}"] = RECIPES[name]
    again = train_many(2, over("torch", recipes), tmp_path, resume="--resume")
    for name, run in again.items():
        whole = runs["horovod", 1][name.partition("-")[0]]
        assert end_of(run) == end_of(whole), name
        assert events(run, "overflow") == events(whole, "overflow"), name
