"""Our `train` against a plain PyTorch loop: weights, BatchNorm statistics and averages agree to 1e-9 in float64.

On one rank every model and every way to train, on data with a tail of 1 and of kn - 1 samples. On three ranks, which
have two workers, two and one, each once: models with a tail that leaves two ranks idle, ways with one that ends short.
"""

import os
from functools import cache
from pathlib import Path

import models
import plain
import pytest
import small_sets
import torch
from conftest import changed, train_many

RECIPE = {
    "seed": 5,
    "precision": "float64",
    "determinism": "off",
    "model": {"name": "models:Plain"},
    "data": {"dataset": "small_sets:whole"},
    "batch": {"samples_per_worker": 4, "workers": 5, "bn_group": 4, "last_batch": "partial"},
    "optim": {"name": "sgd", "form": "u", "base_lr": 0.1, "base_batch": 20, "momentum": 0.9, "nesterov": True,
              "momentum_correction": True, "weight_decay": 0.01, "decay_in": "gradient",
              "beta2": 0.99, "epsilon": 1e-8, "trust": 0.02},
    "schedule": {"kind": "decaying-lr", "warmup": "gradual", "warmup_epochs": 2, "warmup_start_lr": 0.02,
                 "milestones": [6], "factor": 5.0},
    "train": {"epochs": 20, "max_steps": 50, "ema_decay": 0.9, "eval_epochs": 20},
    "machine": {"threads": 1, "loader_threads": 1},
}  # fmt: skip

TAILS = ("tail_of_one", "one_short")
MODELS = (
    "Plain", "Twice", "FrozenNorm", "Subclassed", "Timms", "Branch", "NeverTaken", "OnceOrTwice", "Recomputed",
    "Vectors", "Groups", "Shared", "FrozenParameters", "Unused", "Attention", "Slow", "NotAffine", "NoRunning",
)  # fmt: skip
SETTINGS = {
    "no-nesterov": {"optim__nesterov": False},
    "v-form": {"optim__form": "v"},
    "v-form-no-nesterov": {"optim__form": "v", "optim__nesterov": False},
    "v-form-uncorrected": {"optim__form": "v", "optim__momentum_correction": False},
    "constant-warmup": {"schedule__warmup": "constant"},
    "lars": {"optim__name": "lars", "optim__base_lr": 2.0},
    "lars-decay-in-loss": {"optim__name": "lars", "optim__base_lr": 2.0, "optim__decay_in": "loss"},
    "adam": {"optim__name": "adam", "optim__base_lr": 0.003, "schedule__warmup_start_lr": 0.001},
    "decay-in-loss": {"optim__decay_in": "loss"},
    "small-groups": {"batch__bn_group": 2},
    "two-a-pass": {"machine__workers_per_pass": 2},
    "two-a-pass-small-groups": {"machine__workers_per_pass": 2, "batch__bn_group": 2},
}
WAYS = {model: (model, {}) for model in MODELS} | {name: ("Plain", changes) for name, changes in SETTINGS.items()}
CASES = {"no-tail": RECIPE} | {
    f"{way}-{data}": changed(RECIPE, model__name=f"models:{model}", data__dataset=f"small_sets:{data}", **changes)
    for way, (model, changes) in WAYS.items()
    for data in TAILS
}
EPOCHS = 12
ONE_WEIGHT_A_SAMPLE = changed(
    RECIPE, model__name="models:OneWeightASample", data__dataset="small_sets:unit_vectors",
    batch__workers=4, optim__base_batch=16, optim__weight_decay=0.0, schedule__warmup="none", schedule__milestones=[],
    train__loss="models:output_itself", train__epochs=EPOCHS,
)  # fmt: skip
ALIKE = {
    "alike": ONE_WEIGHT_A_SAMPLE,
    "alike-no-nesterov": changed(ONE_WEIGHT_A_SAMPLE, optim__nesterov=False),
    "alike-v-form": changed(ONE_WEIGHT_A_SAMPLE, optim__form="v", optim__nesterov=False),
}
ONCE = ["no-tail", *(f"{m}-tail_of_one" for m in MODELS), *(f"{s}-one_short" for s in SETTINGS)]
ON_RANKS = [(1, case) for case in CASES] + [(3, case) for case in ONCE]
MEANS = {"Recomputed": "Plain"}  # what the plain loop trains in their place


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    return cache(lambda ranks: train_all(ranks, tmp_path_factory))


def train_all(ranks, folders):
    """{case: run folder, or what was said where training failed}. One launch for all, if none fails: a rank that dies
    ends its launch, and the cases after it get another."""
    found, left = {}, {case: CASES[case] for on, case in ON_RANKS if on == ranks} | ALIKE
    while left:
        root = folders.mktemp("oracle")
        try:
            found |= train_many(ranks, left, root)
        except AssertionError as problem:
            runs = {case: root / f"{case}-on-{ranks}" for case in left}
            done = {case: run for case, run in runs.items() if (run / "checkpoints/LATEST").exists()}
            found |= done | {next(case for case in left if case not in done): str(problem)}
        left = {case: recipe for case, recipe in left.items() if case not in found}
    return found


@cache
def expected(case):
    recipe = CASES[case]
    model = recipe["model"]["name"].removeprefix("models:")
    data = getattr(small_sets, recipe["data"]["dataset"].removeprefix("small_sets:"))("train")
    torch.manual_seed(recipe["seed"])
    return plain.train(recipe, getattr(models, MEANS.get(model, model))(3, 3), data)


def saved(run, file):
    assert isinstance(run, Path), run
    return torch.load(run / "checkpoints" / (run / "checkpoints/LATEST").read_text().strip() / file, weights_only=True)


def check(found, state):
    assert found.keys() >= state.keys()
    off = {name: (found[name] - value).abs().max().item() for name, value in state.items()}
    assert all(difference <= 1e-9 for difference in off.values()), off


@pytest.mark.parametrize("ranks, case", ON_RANKS)
def test_weights_and_statistics(runs, ranks, case):
    check(saved(runs(ranks)[case], "weights.pt"), expected(case)[0])


@pytest.mark.parametrize("ranks, case", ON_RANKS)
def test_their_moving_average(runs, ranks, case):
    check(saved(runs(ranks)[case], "weights_ema.pt"), expected(case)[1])


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("case", ALIKE)
def test_every_sample_moves_the_weights_alike(runs, ranks, case):
    """N = 3 * 16 + 1, and weight i has a gradient of 1, from sample i alone. What a sample has moved by the end, and
    what momentum would still move without further gradients, is lr / (kn * (1 - m)) an epoch: for the lone one in the
    tail, too."""
    optim = ALIKE[case]["optim"]
    lr, m = optim["base_lr"], optim["momentum"]
    moved = -saved(runs(ranks)[case], "weights.pt")["weights.weight"]
    buffer = saved(runs(ranks)[case], "optimizer.pt")["momentum"]["weights.weight"]
    remaining = buffer * m / (1 - m) * (lr if optim["form"] == "u" else 1) * (m if optim["nesterov"] else 1)
    torch.testing.assert_close(
        moved + remaining, torch.full_like(moved, EPOCHS * lr / (16 * (1 - m))), rtol=0, atol=1e-12
    )
