"""What decides the next step is in the checkpoint; what cannot be kept is refused; a bad step is the same for all."""

import json
import os
import shutil

import pytest
import torch
from conftest import changed, command, records, train_many, train_on, write_recipe

OWN = {
    "seed": 5,
    "determinism": "any-ranks",
    "data": {"dataset": "spine_models:vectors"},
    "model": {"name": "spine_models:net"},
    "batch": {"samples_per_worker": 4, "workers": 5},
    "optim": {"base_lr": 0.05, "base_batch": 20},
    "schedule": {"kind": "constant", "warmup": "none"},
    "train": {"epochs": 2},
}
ADAPTS = {
    "schedule__kind": "adaptive-batch", "train__noise_scale_steps": 2, "schedule__noise_factor": 40.0,
    "schedule__max_batch": 160, "batch__workers": 4, "train__epochs": 4, "schedule__warmup_epochs": 1,
    "determinism": "any-ranks", "train__max_steps": None, "checkpoint__steps": 1, "checkpoint__keep": 99,
}  # fmt: skip
BAD = {"data__dataset": "spine_models:with_bad_samples", "train__on_bad_step": "skip"}
WAYS = {
    "sgd": {},
    "v-form": {"optim__form": "v", "schedule__kind": "cosine", "schedule__warmup": "gradual",
               "schedule__warmup_epochs": 1, "schedule__warmup_start_lr": 0.01},
    "adam": {"optim__name": "adam", "optim__base_lr": 0.01},
    "average": {"train__ema_decay": 0.9, "batch__last_batch": "drop"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_models():
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])


def end_of(run):
    return records(run, "end")[-1]["weights_sha256"]


def back_at(run, step, copy):
    """A copy of a run as a kill right after the checkpoint of `step` leaves it."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (copy / "status.json").unlink()
    return copy


def test_a_kill_around_a_decision_changes_nothing(small_recipe, tmp_path):
    """Adaptive batch: from each checkpoint around the decisions the run goes on to the same weights, on other ranks."""
    recipe = changed(small_recipe, **ADAPTS)
    (whole,) = train_many(2, {"whole": recipe}, tmp_path).values()
    decisions = [r for r in records(whole, "event") if r["event"] == "decision"]
    assert decisions
    steps = sorted({d["step"] + i for d in decisions for i in (-2, -1, 0, 1, 2)} & {*range(1, 999)})
    steps = [s for s in steps if (whole / "checkpoints" / f"step-{s:08d}").exists()]
    assert set(steps) >= {d["step"] for d in decisions}
    for s in steps:
        back_at(whole, s, tmp_path / f"from-{s}-on-3")
    runs = train_many(3, {f"from-{s}": recipe for s in steps}, tmp_path, resume="--resume")
    assert {name: end_of(run) for name, run in runs.items()} == {name: end_of(whole) for name in runs}
    again = [r for r in records(runs[f"from-{steps[0]}"], "event") if r["event"] == "decision"]
    kept = ("step", "epoch", "workers", "global_batch", "lr", "noise_scale")
    assert [[d[k] for k in kept] for d in again] == [[d[k] for k in kept] for d in decisions]


def test_a_skipped_step_is_skipped_by_all(tmp_path):
    """Two samples are NaN: their steps change nothing, on 1 and 3 ranks alike, and a resume between them knows."""
    recipes = {name: changed(OWN, **BAD | more | {"checkpoint__steps": 1, "checkpoint__keep": 99})
               for name, more in WAYS.items()}  # fmt: skip
    found = {ranks: train_many(ranks, recipes, tmp_path) for ranks in (1, 3)}
    for name in WAYS:
        one, three = (found[ranks][name] for ranks in (1, 3))
        assert end_of(one) == end_of(three), name
        skipped = [r["step"] for r in records(one, "event") if r["event"] == "skipped"]
        assert 2 <= len(skipped) <= 4 and skipped == [r["step"] for r in records(one, "step") if r.get("skipped")]
        assert skipped == [r["step"] for r in records(three, "event") if r["event"] == "skipped"]
        state = json.loads(next((one / "checkpoints").glob(f"step-{skipped[0] + 1:08d}/state.json")).read_text())
        before = json.loads(next((one / "checkpoints").glob(f"step-{skipped[0]:08d}/state.json")).read_text())
        assert state["weights_sha256"] == before["weights_sha256"] and state["skipped"] == skipped[:1]
        assert all(r["loss"] is None for r in records(one, "step") if r.get("skipped"))
    for name, run in found[1].items():
        back_at(run, [r["step"] for r in records(run, "event") if r["event"] == "skipped"][0] + 1,
                tmp_path / f"back-{name}-on-2")  # fmt: skip
    again = train_many(2, {f"back-{name}": recipe for name, recipe in recipes.items()}, tmp_path, resume="--resume")
    for name, run in again.items():
        assert end_of(run) == end_of(found[1][name.removeprefix("back-")]), name


def test_too_many_bad_steps_end_the_run(tmp_path):
    recipe = changed(OWN, **BAD | {"optim__base_lr": 1e30, "train__bad_steps_limit": 3, "determinism": "off"})
    result = train_on(2, write_recipe(tmp_path / "r.yaml", recipe), tmp_path / "run")
    assert result.returncode == 1 and "3 steps before it were skipped (train.bad_steps_limit)" in result.stderr
    skipped = [r["step"] for r in records(tmp_path / "run", "event") if r["event"] == "skipped"]
    assert skipped[-3:] == list(range(skipped[-1] - 2, skipped[-1] + 1))


def test_amendments_open_a_segment(tmp_path):
    """A learning rate changed at step 6 of a v-form run: steps before it stay, and it is kept over more resumes."""
    more = {"determinism": "any-ranks", "checkpoint__steps": 2, "checkpoint__keep": 99}
    recipes = {form: changed(OWN, **more | {"optim__form": form}) for form in ("v", "u")}
    changes = {"resume": "--resume", "amend": ("optim.base_lr=0.01", "train.epochs=3")}
    begun = train_many(1, {form: changed(r, train__max_steps=6) for form, r in recipes.items()}, tmp_path)
    begun["v"].rename(tmp_path / "v-on-2")
    further = train_many(2, {"v": changed(recipes["v"], train__max_steps=10)}, tmp_path, **changes)
    further["v"].rename(begun["v"])
    run, other = train_many(1, recipes, tmp_path, **changes).values()
    steps = records(run, "step")
    assert [s["step"] for s in steps] == list(range(24))
    shown = command("plan", run, "--json")
    assert shown.returncode == 0, shown.stderr
    planned = json.loads(shown.stdout)
    assert planned["amendments"] == [{"step": 6, "changes": {"optim.base_lr": 0.01, "train.epochs": 3}}]
    assert planned["steps"] == 24
    assert [(s["first_step"], s["lr"]) for s in planned["stages"]] == [(0, 0.05), (6, 0.01)]
    assert "amended        at step 6: optim.base_lr = 0.01, train.epochs = 3" in command("plan", run).stdout
    assert {s["lr"] for s in steps[:6]} == {0.05} and {s["lr"] for s in steps[6:]} == {0.01}
    # a requeued batch script says it again, in the middle and at the end: nothing is amended twice
    (event,) = [r for r in records(run, "event") if r["event"] == "amendment"]
    assert event["step"] == 6 and event["changes"] == {"optim.base_lr": 0.01, "train.epochs": 3}
    # u-form under the same learning rates ends at the same weights up to rounding: v was corrected at the seam
    assert records(other, "step")[-1]["loss"] == pytest.approx(steps[-1]["loss"], rel=1e-4)


def test_an_amendment_outlives_a_kill(tmp_path):
    """Killed before the next checkpoint: the run goes on with it, and with the fixed point that was amended too."""
    recipe = write_recipe(tmp_path / "r.yaml", changed(OWN, checkpoint__steps=6, checkpoint__keep=99))
    run = tmp_path / "run"
    assert train_on(1, recipe, run, "--set", "train.max_steps=6").returncode == 0
    words = ("--resume", "--amend", "optim.base_lr=0.01", "--amend", "fixed_point_bits=36")
    result = train_on(2, recipe, run, *words)
    assert result.returncode == 0, result.stderr
    killed = back_at(run, 6, tmp_path / "killed")
    result = train_on(3, recipe, killed, "--resume")
    assert result.returncode == 0, result.stderr
    assert "at step 6: optim.base_lr = 0.01, fixed_point_bits = 36" in result.stderr
    assert {r["lr"] for r in records(killed, "step") if r["step"] >= 6} == {0.01}
    assert end_of(killed) == end_of(run)


def test_amendments_that_rewrite_the_past_are_refused(tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", OWN)
    run = tmp_path / "run"
    refused = command("train", recipe, "--run", run, "--amend", "optim.base_lr=0.01")
    assert refused.returncode == 2 and "--amend optim.base_lr=0.01: only with --resume" in refused.stderr
    refused = command("train", recipe, "--run", run, "--resume-if-exists", "--amend", "optim.base_lr=0.01")
    assert refused.returncode == 2 and "to amend; a run that starts has its recipe" in refused.stderr
    assert not run.exists()
    assert command("train", recipe, "--run", run, "--set", "train.max_steps=9").returncode == 0
    for change, says in (("seed=3", "expected KEY=VALUE with one of optim.base_lr"),
                         ("train.epochs=1", "the run has taken 9 steps, and would have 8"),
                         ("optim.base_lr=-1", "optim.base_lr"), ("optim.base_lr", "expected KEY=VALUE")):  # fmt: skip
        result = command("train", recipe, "--run", run, "--resume", "--amend", change)
        assert result.returncode == 2 and says in result.stderr, result.stderr
    amendments = run / "amendments.json"
    amendments.write_text('[[3, {"seed": 4}]]')
    result = command("train", recipe, "--run", run, "--resume")
    assert result.returncode == 2 and f"{amendments}: seed at step 3 cannot be amended" in result.stderr
    amendments.unlink()
    written = run / "checkpoints" / "step-00000009" / "state.json"  # by a version whose tails were others
    content = json.loads(written.read_text()) | {"rules": 1}
    del content["sha256"]
    written.write_text(json.dumps(content))
    result = command("train", recipe, "--run", run, "--resume")
    assert result.returncode == 2 and "partial tails and averaged weights followed other rules (1" in result.stderr
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "done"  # a refusal changes nothing


def test_compiled_stages_keep_their_bits_over_a_resume(small_recipe, tmp_path):
    """any-ranks with torch.compile, stopped before a tail, gone on with on two ranks: graphs of whole and tail steps
    must not depend on which came first."""
    more = {"determinism": "any-ranks", "machine__compile": "stages", "train__max_steps": 4, "model__dropout": 0.2,
            "data__eval": None}  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", changed(small_recipe, **more))
    assert train_on(1, recipe, tmp_path / "whole", timeout=500).returncode == 0
    assert train_on(1, recipe, tmp_path / "run", "--set", "train.max_steps=1", timeout=500).returncode == 0
    result = train_on(2, recipe, tmp_path / "run", "--resume", timeout=500)
    assert result.returncode == 0, result.stderr
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")
    other = command("train", recipe, "--run", tmp_path / "run", "--resume", "--set", "machine.compile=none")
    assert other.returncode == 2 and "machine.compile = none (the run has stages)" in other.stderr


def test_the_noise_scale_does_not_see_buckets(small_recipe, tmp_path):
    """A machine key that decides nothing: adaptive batch ends at the same weights with small buckets."""
    recipes = {f"{mb:g}": changed(small_recipe, **ADAPTS | {"machine__bucket_mb": mb, "machine__first_bucket_mb": mb})
               for mb in (0.002, 25.0)}  # fmt: skip
    assert len({end_of(run) for run in train_many(2, recipes, tmp_path).values()}) == 1


def test_preflight_refuses_before_anything_is_spent(tmp_path):
    for ranks, refused in (
        (1, {"model__name:spectral": "spectral_norm, whose vectors are changed by each forward",
             "data__dataset:drifting_data": "worker 0's samples are others each time"}),
        (2, {"model__name:own_weights": "its starting weights are others",
             "model__name:threads_on_rank_1": "it computes with another number of threads; threads 2, others 1"}),
    ):  # fmt: skip
        recipes = {}
        for what in refused:
            key, name = what.split(":")
            recipes[name] = changed(OWN, **{key: f"spine_models:{name}"})
        runs = train_many(ranks, recipes, tmp_path, refused=tuple(refused.values()))
        assert not any(run.exists() for run in runs.values())
    asked = command("preflight", tmp_path / "spectral-on-1.yaml", "--json", cwd=tmp_path)
    (check,) = json.loads(asked.stdout)["checks"]
    assert asked.returncode == 1 and not check["ok"] and "_SpectralNorm" in check["what"]


def test_float64_data_is_trained_and_evaluated(tmp_path):
    run = tmp_path / "run"
    result = train_on(1, write_recipe(tmp_path / "r.yaml", changed(OWN, train__epochs=6)), run)
    assert result.returncode == 0, result.stderr
    assert records(run, "eval")[-1]["accuracy"] > 0.6
    assert json.loads((run / "preflight.json").read_text())["threads"] == 1
    assert "checks in" in result.stderr


def test_state_that_later_forwards_change_ends_the_run_at_a_checkpoint(tmp_path):
    """A scale that falls every 30th forward: preflight sees what counts them, and without it the first checkpoint sees
    the scale."""
    recipe = write_recipe(tmp_path / "r.yaml", changed(OWN, model__name="spine_models:drifts", checkpoint__steps=4))
    refused = command("train", recipe, "--run", tmp_path / "run")
    assert refused.returncode == 2 and "state: count is another where other samples went before" in refused.stderr
    result = train_on(2, recipe, tmp_path / "run", "--set", "train.preflight=false")
    assert result.returncode == 1 and "scale was changed since the start" in result.stderr, result.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"


def test_frozen_where_it_was_made_is_frozen_for_the_run(tmp_path):
    """With preflight or without, over an evaluation and a resume: one hash."""
    base = changed(OWN, model__name="spine_models:frozen_net", checkpoint__steps=1, checkpoint__keep=99)
    recipes = {"with": base, "without": changed(base, train__preflight=False)}
    runs = train_many(2, recipes, tmp_path)
    for name, run in runs.items():
        back_at(run, 9, tmp_path / f"{name}-back-on-1")
    more = train_many(1, {f"{name}-back": recipe for name, recipe in recipes.items()}, tmp_path, resume="--resume")
    assert len({end_of(run) for run in [*runs.values(), *more.values()]}) == 1
    state = torch.load(next((runs["with"] / "checkpoints").glob("step-*16")) / "weights.pt", weights_only=True)
    assert state["1.running_mean"].abs().max() == 0 and state["1.num_batches_tracked"] == 0


def test_preflight_on_many_ranks_is_launched_as_a_run_is(tmp_path):
    """The same words, no run folder; a check that fails is exit code 1."""
    recipe = write_recipe(tmp_path / "r.yaml", OWN)
    words = ("launch", "--np", "2", "--oversubscribe", "--", "preflight", recipe)
    good = command(*words, "--json", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    found = {c["check"]: c["ok"] for c in json.loads(good.stdout)["checks"]}
    assert found.keys() == {"data", "state", "model", "masks", "workers", "ranks"} and all(found.values())
    assert not (tmp_path / "runs").exists()
    bad = command(*words, "--set", "model.name=spine_models:spectral", cwd=tmp_path)
    assert bad.returncode == 1 and "FAILED  start" in bad.stdout, bad.stdout + bad.stderr
