"""The promise: a run's result depends on its recipe, not on how many ranks ran it. Real mpirun, real Horovod, and
torch.distributed in its place.
"""

import json

import pytest
import torch
from conftest import CLASSES, changed, records, train_many

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.train import models

STEPS = 20

# float64: agreement to 1e-9. k = 16 and k = 3 on N = 203: the tail is crossed, with full, short and empty workers.
FLOAT64 = {"precision": "float64"}
FLOAT64_VARIANTS = {
    "k16": {}, "k3": {"batch__workers": 3}, "k16-2-a-pass": {"machine__workers_per_pass": 2},
    "k3-all-a-pass": {"batch__workers": 3, "machine__workers_per_pass": 3},
    "k16-many-buckets": {"machine__bucket_mb": 0.01},
    "k16-dali": {"data__loader": "dali"},
}  # fmt: skip
EXACT = {"determinism": "any-ranks", "precision": "float32"}
EXACT_VARIANTS = {"exact-k16": {}, "exact-k3": {"batch__workers": 3}, "exact-dali": {"data__loader": "dali"}}
# Tiny BatchNorm groups at a high learning rate multiply a rounding by 1e5 in 20 steps (float64 shows it: 1e-16
# becomes 1e-11). Where float32 is compared, the recipe is a calm one.
CALM = {"model__zero_gamma": True, "model__dropout": 0.0, "batch__bn_group": 8, "optim__base_lr": 0.05}
CALM_VARIANTS = {"calm": {}, "calm-fp16": {"wire": "fp16"}, "calm-exact": EXACT}
TORCH = {"machine__engine": "torch"}
ON_TORCH = {  # on 2 and 3 ranks; small buckets, of which some are of one size
    "k16-many-buckets": FLOAT64 | {"machine__bucket_mb": 0.005, "machine__first_bucket_mb": 0.001},
    "k3-all-a-pass": FLOAT64 | FLOAT64_VARIANTS["k3-all-a-pass"],
    "k3-same-ranks": FLOAT64 | {"batch__workers": 3, "determinism": "same-ranks"},
    **{name: EXACT | v | {"machine__bucket_mb": 0.005} for name, v in EXACT_VARIANTS.items() if "dali" not in name},
    **{name: CALM | v for name, v in CALM_VARIANTS.items()},
    "calm-bf16": CALM | {"wire": "bf16"},
}


def jobs_for(ranks):
    """Which variants run on how many ranks; all are compared with the run on one."""
    jobs = {}
    if ranks in (1, 2, 3, 5):
        jobs |= {name: FLOAT64 | v for name, v in FLOAT64_VARIANTS.items() if ranks in (1, 3) or len(name) <= 3}
    jobs |= {name: EXACT | v for name, v in EXACT_VARIANTS.items()}
    if ranks in (1, 2, 4):
        jobs |= {name: CALM | v for name, v in CALM_VARIANTS.items()}
    return jobs


@pytest.fixture(scope="module")
def run_all(small_recipe, tmp_path_factory):
    """run_all(ranks, variants) trains them; returns {variant: run folder}."""

    def run_all(ranks, variants):
        recipes = {name: changed(small_recipe, train__max_steps=STEPS, **v) for name, v in variants.items()}
        return train_many(ranks, recipes, tmp_path_factory.mktemp("ranks"))

    return run_all


class OnDemand(dict):
    """Runs are made when a test first asks for them."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, ranks):
        self[ranks] = self.make(ranks)
        return self[ranks]


@pytest.fixture(scope="module")
def runs(run_all):
    """{ranks: {variant: run folder}}, each of STEPS, through Horovod."""

    def make(ranks):
        fusion = {"machine__reduction": "fusion"}  # Horovod reads its threshold once
        fused = {"k16-fusion": FLOAT64 | fusion, "exact-k16-fusion": EXACT | fusion} if ranks == 3 else {}
        return run_all(ranks, jobs_for(ranks)) | (run_all(ranks, fused) if fused else {})

    return OnDemand(make)


@pytest.fixture(scope="module")
def torch_runs(run_all):
    """The same through torch.distributed."""
    return OnDemand(lambda ranks: run_all(ranks, {name: v | TORCH for name, v in ON_TORCH.items()}))


def state_of(run):
    return torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "weights.pt", weights_only=True)


def losses(run):
    return [r["loss"] for r in records(run, "step")]


def same_to(tolerance, a, b):
    torch.testing.assert_close(torch.tensor(losses(a)), torch.tensor(losses(b)), rtol=0, atol=tolerance)
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_float64_agrees_to_1e_9(runs, ranks):
    for name in FLOAT64_VARIANTS:
        if name in runs[ranks] and "dali" not in name:
            same_to(1e-9, runs[1]["k3" if name.startswith("k3") else "k16"], runs[ranks][name])
    assert len(losses(runs[ranks]["k16"])) == STEPS


def test_float64_agrees_through_dali(runs):
    """Pictures that are not resized are the same pixels in both loaders, and normalised in float32."""
    same_to(1e-9, runs[1]["k16-dali"], runs[3]["k16-dali"])
    same_to(1e-4, runs[1]["k16"], runs[3]["k16-dali"])


@pytest.mark.parametrize("variant", list(EXACT_VARIANTS))
def test_any_ranks_gives_one_hash(runs, variant):
    """float32, weights and running statistics: the same bits on 1, 2, 3, 4 and 5 ranks; the same losses too."""
    ends = {ranks: records(runs[ranks][variant], "end")[0]["weights_sha256"] for ranks in (1, 2, 3, 4, 5)}
    assert len(set(ends.values())) == 1, ends
    assert len({tuple(losses(runs[ranks][variant])) for ranks in (1, 2, 3, 4, 5)}) == 1
    evals = [tuple((r["loss"], r["accuracy"]) for r in records(runs[ranks][variant], "eval")) for ranks in (1, 3, 5)]
    assert len(set(evals)) == 1


def test_any_ranks_gives_that_hash_through_run_time_fusion(runs):
    """Integers: what Horovod sums together, and in which order, does not matter."""
    fused, plain = (records(runs[3][name], "end")[0]["weights_sha256"] for name in ("exact-k16-fusion", "exact-k16"))
    assert fused == plain


@pytest.mark.parametrize("ranks", [2, 4])
def test_float32_stays_near_one_rank(runs, ranks):
    """Stated tolerances after STEPS: float32 and fixed point 1e-4, gradients sent as float16 1e-2."""
    same_to(1e-4, runs[1]["calm"], runs[ranks]["calm"])
    same_to(1e-4, runs[1]["calm"], runs[ranks]["calm-exact"])
    same_to(1e-2, runs[1]["calm"], runs[ranks]["calm-fp16"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchs_collectives_give_the_results_of_horovod(runs, torch_runs, ranks):
    """any-ranks: its hash. Else within the tolerances above; k = 3 leaves a rank of three idle in the tail."""
    found = torch_runs[ranks]
    assert records(found["k16-many-buckets"], "start")[0]["engine"] == "torch"
    for variant in ("exact-k16", "exact-k3"):
        ends = [records(run, "end")[0]["weights_sha256"] for run in (runs[1][variant], found[variant])]
        assert ends[0] == ends[1] and losses(runs[1][variant]) == losses(found[variant])
    for variant in ("k16-many-buckets", "k3-all-a-pass", "k3-same-ranks"):
        same_to(1e-9, runs[1][variant[:3].rstrip("-")], found[variant])
    for variant, tolerance in (("calm", 1e-4), ("calm-exact", 1e-4), ("calm-fp16", 1e-2), ("calm-bf16", 3e-2)):
        same_to(tolerance, runs[1]["calm"], found[variant])


def test_equal_is_not_idle(runs):
    """The comparisons above would hold for runs that do nothing: weights and statistics must have moved."""
    recipe = recipes.load_resolved(runs[1]["k16"] / "recipe.yaml")
    fresh = models.build(recipe.model, 1, CLASSES, recipe.seed, torch.float64).state_dict()
    final = state_of(runs[1]["k16"])
    for name, value in final.items():
        assert (value - fresh[name]).abs().max() > 1e-3, name
    found = losses(runs[1]["k16"])
    assert sum(found[-4:]) < sum(found[:4])


def test_evaluation_counts_every_sample_once(runs):
    for ranks in (1, 2, 3, 5):
        for record in records(runs[ranks]["k16"], "eval"):
            assert record["samples"] == 61
            assert abs(record["accuracy"] * 61 - round(record["accuracy"] * 61)) < 1e-9


def test_records_are_complete(runs):
    for ranks in (1, 3):
        run = runs[ranks]["k3"]
        (start,) = records(run, "start")
        assert (start["engine"], start["ranks"], start["workers"], start["global_batch"]) == ("horovod", ranks, 3, 24)
        assert list(start["start_s"]) == ["engine", "prepare", "build", "open"] and min(start["start_s"].values()) >= 0
        steps = records(run, "step")
        assert [s["step"] for s in steps] == list(range(STEPS))
        assert [s["samples"] for s in steps[:9]] == [24] * 8 + [11]
        assert steps[8]["lr"] == pytest.approx(steps[9]["lr"], rel=0.2)  # the tail keeps the learning rate
        for key in ("epoch", "loss", "lr", "global_batch", "images_per_s", "data_wait_s", "step_s"):
            assert all(key in s for s in steps)
        assert json.loads((run / "status.json").read_text())["status"] == "done"
        assert (run / "recipe.yaml").exists() and list((run / "tensorboard").iterdir())
        environment = json.loads((run / "environment.json").read_text())
        assert len(environment[0]["ranks"]) == ranks and environment[0]["versions"]["horovod"] == "0.28.1"
