"""The same recipes through DistributedDataParallel: the same weights, and what it cannot do refused by name."""

import os
from contextlib import nullcontext

import pytest
import torch
from conftest import SAMPLES, changed, command, records, train_many, train_on, write_recipe

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.train.prepare import refuse_idle_ranks

STEPS = 12
FLOAT64 = {"precision": "float64", "train__max_steps": STEPS}
VARIANTS = {
    "k16": {},
    "k3": {"batch__workers": 3},
    "two-a-pass": {"machine__workers_per_pass": 2, "machine__bucket_mb": 0.01},
    "noise": {"train__noise_scale_steps": 3},
    "grows": {"schedule__kind": "increasing-batch", "schedule__milestones": [1, 2], "schedule__factor": 2.0,
              "schedule__max_batch": 96, "batch__workers": 4},
    "frozen": {"model": {"name": "unused:frozen"}},
    "shared": {"model": {"name": "unused:shared"}},
}  # fmt: skip
DDP = {"machine__engine": "ddp"}


@pytest.fixture(autouse=True)
def find_unused(monkeypatch):
    here = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="module")
def runs(small_recipe, tmp_path_factory):
    """{ranks: {variant: run folder}}: on one rank through Horovod, on 2 and 3 through DDP."""
    root = tmp_path_factory.mktemp("ddp")
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    found = {}
    for ranks in (1, 2, 3):
        # three workers in a tail of two leave the third rank idle, which DDP refuses
        names = [name for name in VARIANTS if ranks < 3 or name not in ("k3", "grows")]
        base = FLOAT64 | (DDP if ranks > 1 else {})
        found[ranks] = train_many(ranks, {n: changed(small_recipe, **base, **VARIANTS[n]) for n in names}, root)
    return found


def end_state(run):
    return torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "weights.pt", weights_only=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_float64_agrees_with_one_rank(runs, ranks):
    """Weights and running statistics to 1e-9, losses to 1e-8: full steps, tails, several passes, measured steps."""
    for name, run in runs[ranks].items():
        (start,) = records(run, "start")
        assert (start["engine"], start["ranks"]) == ("ddp", ranks)
        losses, expected = ([r["loss"] for r in records(r, "step")] for r in (run, runs[1][name]))
        # each pass's loss is rounded to multiples of 2^-30
        assert losses == pytest.approx(expected, rel=0, abs=1e-8), name
        state, reference = end_state(run), end_state(runs[1][name])
        assert state.keys() == reference.keys()
        for key in state:
            torch.testing.assert_close(state[key], reference[key], rtol=0, atol=1e-9, msg=f"{name}: {key}")


def test_the_noise_scale_is_measured_alike(runs):
    found = {
        ranks: [r["noise_trace"] for r in records(runs[ranks]["noise"], "step") if "noise_trace" in r]
        for ranks in (1, 2, 3)
    }
    assert len(found[1]) >= 2
    for ranks in (2, 3):
        assert found[ranks] == pytest.approx(found[1], rel=1e-6)


def test_a_resume_goes_on_with_another_number_of_ranks(small_recipe, tmp_path, runs):
    """Six steps, then on from the checkpoint on another number of ranks: the weights of the run without a stop."""
    half = changed(small_recipe, **FLOAT64 | {"train__max_steps": 6}, **DDP)
    run = tmp_path / "run"
    first = train_on(3, write_recipe(tmp_path / "half.yaml", half), run)
    assert first.returncode == 0, first.stderr
    whole = write_recipe(tmp_path / "whole.yaml", changed(small_recipe, **FLOAT64, **DDP))
    second = train_on(2, whole, run, "--resume")
    assert second.returncode == 0, second.stderr
    for key, value in end_state(run).items():
        torch.testing.assert_close(value, end_state(runs[1]["k16"])[key], rtol=0, atol=1e-9)


def test_unused_parameters_are_named_and_end_all_ranks(small_recipe, tmp_path):
    recipe = changed(small_recipe, **FLOAT64, **DDP, model={"name": "unused:model"})
    result = train_on(2, write_recipe(tmp_path / "r.yaml", recipe), tmp_path / "run")
    assert result.returncode == 1
    assert "no gradient for unused.bias, unused.weight" in result.stderr


def test_one_rank_needs_no_launcher(small_recipe, tmp_path):
    recipe = changed(small_recipe, **DDP, train__max_steps=2)
    done = command("train", write_recipe(tmp_path / "r.yaml", recipe), "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "run", "start")[0]["engine"] == "ddp"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"determinism": "any-ranks"}, "determinism = any-ranks: machine.engine = ddp allows: off"),
        ({"determinism": "same-ranks"}, "determinism = same-ranks: machine.engine = ddp allows: off"),
        ({"wire": "fp16"}, "wire = fp16: machine.engine = ddp allows: fp32"),
        ({"machine__reduction": "fusion"}, "machine.reduction = fusion: machine.engine = ddp allows: buckets"),
    ],
)
def test_what_ddp_cannot_do_is_refused(small_recipe, changes, said):
    with pytest.raises(RequestError, match=said):
        recipes.validate(changed(small_recipe, **DDP, **changes))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch__workers": 3}, "the tail's workers = 2 on 3 ranks"),
        ({"batch__workers": 2}, "batch.workers = 2 on 3 ranks"),
        ({"schedule__kind": "adaptive-batch", "schedule__max_batch": 160}, "schedule.kind = adaptive-batch"),
        ({"batch__workers": 3, "batch__last_batch": "drop"}, None),
        ({"batch__workers": 16}, None),  # a tail of ten workers
    ],
)
def test_idle_ranks_are_refused(small_recipe, changes, said):
    recipe = recipes.validate(changed(small_recipe, **DDP, **changes))
    with pytest.raises(RequestError, match=said) if said else nullcontext():
        refuse_idle_ranks(recipe, recipe.build_schedule(SAMPLES), 3)


def test_a_refusal_ends_all_ranks_before_work_starts(small_recipe, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", changed(small_recipe, **DDP, batch__workers=3))
    result = train_on(3, recipe, tmp_path / "run")
    assert result.returncode == 2 and result.stderr.count("the tail's workers = 2 on 3 ranks") == 1
    assert not (tmp_path / "run").exists()
