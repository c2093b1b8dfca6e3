"""Gradients that are None, shared, frozen, unused, or come in another order on each rank, on real ranks: the weights of
the run on one rank, or refused.

DistributedDataParallel's part is in test_ddp.py.
"""

import os

import pytest
import torch
from conftest import changed, records, train_many, train_on, write_recipe

STEPS = 6
BASE = {"precision": "float64", "train__max_steps": STEPS, "optim__weight_decay": 0.01, "batch__bn_group": None}
MODELS = ("model", "frozen", "shared", "sometimes", "branches")
TINY = {"machine__bucket_mb": 0.0005, "machine__first_bucket_mb": 0.0001}  # a bucket a tensor, many of one size
WAYS = {
    "fusion": {"machine__reduction": "fusion"},  # first: Horovod reads its threshold once
    "buckets": TINY,
    "any-ranks": {"determinism": "any-ranks"},
    "two-a-pass": {"machine__workers_per_pass": 2},
}
TORCH = TINY | {"machine__engine": "torch"}
TORCH_WAYS = {
    "torch": TORCH,
    "torch-any-ranks": TORCH | {"determinism": "any-ranks"},
    "torch-idle": TORCH | {"batch__workers": 2},  # on three ranks
}


def models_of(way):
    """The branch that a pass takes depends on all its workers."""
    return MODELS if "idle" not in way and way != "two-a-pass" else MODELS[3:] if "idle" in way else MODELS[:4]


@pytest.fixture(scope="module")
def runs(small_recipe, tmp_path_factory):
    """{(ranks, way, model): run folder}; on one rank each model once."""
    root = tmp_path_factory.mktemp("odd")
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    found = {}
    for ranks, ways in ((1, {"buckets": {}, "idle": {"batch__workers": 2}}), (2, WAYS), (3, TORCH_WAYS)):
        recipes = {
            f"{model}-{way}": changed(small_recipe, **BASE | changes, model={"name": f"unused:{model}"})
            for way, changes in ways.items()
            for model in models_of(way)
        }
        for name, run in train_many(ranks, recipes, root).items():
            model, way = name.split("-", 1)
            found[ranks, way, model] = run
    return found


def end_state(run):
    return torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "weights.pt", weights_only=True)


@pytest.mark.parametrize("ranks, way", [*((2, way) for way in WAYS), *((3, way) for way in TORCH_WAYS)])
def test_several_ranks_give_the_weights_of_one(runs, ranks, way):
    for model in models_of(way):
        alone = runs[1, "idle" if "idle" in way else "buckets", model]
        state, expected = end_state(runs[ranks, way, model]), end_state(alone)
        assert state.keys() == expected.keys()
        for key in state:
            # any-ranks rounds each worker's gradient to 2^-40
            torch.testing.assert_close(state[key], expected[key], rtol=0, atol=1e-9, msg=f"{way}, {model}: {key}")


def test_frozen_stays_unused_decays_shared_is_one(runs):
    unused, frozen = end_state(runs[2, "buckets", "model"]), end_state(runs[2, "buckets", "frozen"])
    kept, left = frozen["unused.weight"], unused["unused.weight"]  # of one start: the recipe's seed
    share = (left / kept).flatten()
    assert 0 < share[0] < 1 and torch.allclose(share, share[0].expand(9))  # a gradient of zero: only decay moves it
    assert torch.equal(unused["unused.bias"], frozen["unused.bias"])  # which biases do not have
    shared = end_state(runs[2, "buckets", "shared"])
    assert torch.equal(shared["layer.weight"], shared["tied"]) and torch.equal(shared["tied"], shared["same.weight"])
    losses = [r["loss"] for r in records(runs[2, "buckets", "shared"], "step")]
    assert losses[-1] < losses[0]


def test_ddp_names_what_one_rank_did_not_use(small_recipe, tmp_path, runs):
    """Some rank has no bright picture in some step: that rank says so, and all end."""
    recipe = changed(small_recipe, **BASE, model={"name": "unused:sometimes"}, machine__engine="ddp")
    recipe = changed(recipe, batch__workers=2, batch__last_batch="drop")
    result = train_on(2, write_recipe(tmp_path / "r.yaml", recipe), tmp_path / "run")
    assert result.returncode == 1
    assert "no gradient for sometimes.bias, sometimes.weight" in result.stderr
