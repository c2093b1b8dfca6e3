"""Batches that grow, and the noise scale that makes them grow: the same on any number of ranks, and across a resume."""

import pytest
from conftest import changed, records, train_many, train_on, write_recipe

from hpc_lbsgd.theory.noise import transferred_lr

RANKS = (1, 2, 3)
EXACT = {"determinism": "any-ranks", "precision": "float32", "model__zero_gamma": True, "train__max_steps": None}
GROWS = {"schedule__kind": "increasing-batch", "schedule__milestones": [1, 2], "schedule__factor": 2.0,
         "schedule__max_batch": 96, "batch__workers": 4, "train__epochs": 3}  # fmt: skip
ADAPTS = {"schedule__kind": "adaptive-batch", "train__noise_scale_steps": 2, "schedule__noise_factor": 40.0,
          "schedule__max_batch": 160, "batch__workers": 4, "train__epochs": 4,
          "schedule__warmup_epochs": 1}  # fmt: skip
VARIANTS = {
    "grows": EXACT | GROWS,
    "adapts": EXACT | ADAPTS,
    "lars": EXACT | GROWS | {"optim__name": "lars", "train__ema_decay": 0.9},
    "adam": EXACT | GROWS | {"optim__name": "adam", "optim__base_lr": 0.01, "schedule__warmup_start_lr": 0.001},
    "v-form": EXACT | GROWS | {"optim__form": "v", "train__label_smoothing": 0.1},
    "float64": {"precision": "float64", "train__noise_scale_steps": 3, "train__epochs": 2, "train__max_steps": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(small_recipe, tmp_path_factory):
    """{ranks: {variant: run folder}}, each to its end."""
    recipes = {name: changed(small_recipe, **changes) for name, changes in VARIANTS.items()}
    root = tmp_path_factory.mktemp("growing")
    return {ranks: train_many(ranks, recipes, root) for ranks in RANKS}


def noise_of(run):
    keys = ("step", "noise_trace", "noise_square", "noise_scale")
    return [tuple(r.get(k) for k in keys) for r in records(run, "step") if "noise_trace" in r]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "float64"])
def test_one_hash_on_any_number_of_ranks(runs, variant):
    ends = {ranks: records(runs[ranks][variant], "end")[0]["weights_sha256"] for ranks in RANKS}
    assert len(set(ends.values())) == 1, ends


def test_the_noise_scale_is_equal_on_any_number_of_ranks(runs):
    exact = {ranks: noise_of(runs[ranks]["adapts"]) for ranks in RANKS}
    assert len(exact[1]) > 4 and exact[1] == exact[2] == exact[3]
    near = {ranks: noise_of(runs[ranks]["float64"]) for ranks in RANKS}
    assert len(near[1]) >= 1
    for ranks in (2, 3):
        for (step, trace, square, _), (step1, trace1, square1, _) in zip(near[ranks], near[1], strict=True):
            assert step == step1 and trace == pytest.approx(trace1, rel=1e-6)
            assert square == pytest.approx(square1, rel=1e-6, abs=1e-9)


def test_the_batch_grew_where_it_should(runs):
    by_epoch = {}
    for r in records(runs[2]["grows"], "step"):
        by_epoch.setdefault(r["epoch"], set()).add(r["global_batch"])
    assert by_epoch == {0: {32}, 1: {64}, 2: {96}}  # max_batch caps the last, the learning rate takes the rest
    decisions = [r for r in records(runs[2]["adapts"], "event") if r.get("event") == "decision"]
    assert decisions and all(d["global_batch"] % 8 == 0 and d["global_batch"] <= 160 for d in decisions)
    first = decisions[0]
    after = [r for r in records(runs[2]["adapts"], "step") if r["epoch"] == first["epoch"]]
    assert {r["global_batch"] for r in after} == {first["global_batch"]} and after[0]["lr"] == first["lr"]
    before = [r for r in records(runs[2]["adapts"], "step") if r["step"] < first["step"] and r["samples"] == 32][-1]
    expected = transferred_lr(before["lr"], 32, first["global_batch"], first["noise_scale"])
    assert first["lr"] == pytest.approx(expected) and first["lr"] > before["lr"]


def test_a_resume_after_a_decision_is_the_run_that_never_stopped(runs, small_recipe, tmp_path):
    """Stopped after the first decision on 2 ranks, continued on 3: the same weights, decisions and measurements."""
    whole = runs[1]["adapts"]
    first = next(r for r in records(whole, "event") if r.get("event") == "decision")
    recipe = write_recipe(tmp_path / "recipe.yaml", changed(small_recipe, **VARIANTS["adapts"]))
    run = tmp_path / "run"
    stop_at = first["step"] + 1
    result = train_on(2, recipe, run, "--set", f"train.max_steps={stop_at}")
    assert result.returncode == 0, result.stderr
    result = train_on(3, recipe, run, "--resume")
    assert result.returncode == 0, result.stderr
    assert records(run, "end")[-1]["weights_sha256"] == records(whole, "end")[-1]["weights_sha256"]
    assert noise_of(run) == noise_of(whole)
