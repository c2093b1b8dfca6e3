"""Recipes: what is refused, and how it is said."""

import pytest

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError


@pytest.mark.parametrize(
    "setting, says",
    [
        ("optim.lr=0.1", r"unknown key optim.lr \(= 0.1\); allowed here: name, base_lr, "),
        ("optimizer.base_lr=1", r"unknown key optimizer .*allowed here: seed, "),
        ("optim.base_lr=-0.1", r"optim.base_lr = -0.1: .*greater than 0"),
        ("optim.base_lr=.nan", r"optim.base_lr = nan: .*finite"),
        ("optim.momentum=1.0", r"optim.momentum = 1.0: .*less than 1"),
        ("batch.samples_per_worker=0", r"batch.samples_per_worker = 0: .*greater than or equal to 1"),
        ("batch.bn_group=5", r"batch.bn_group = 5 must divide batch.samples_per_worker = 32"),
        ("batch.workers=many", r"batch.workers = 'many': .*integer.* or .*'per_rank'"),
        ("schedule.milestones=[60,30]", r"schedule.milestones = \[60, 30\] must rise"),
        ("schedule.milestones=[30,90]", r"schedule.milestones = \[30, 90\]: .* train.epochs = 90"),
        ("schedule.factor=1", r"schedule.factor = 1: .*greater than 1"),
        ("schedule.warmup_epochs=100", r"schedule.warmup_epochs = 100.0 is more than train.epochs = 90"),
        ("data.mean=[1,2]", r"data.mean has 2 values for data.channels = 3"),
        ("data.crop_area=[0.9,0.1]", r"data.crop_area = \[0.9, 0.1\]"),
        ("precision=fp8", r"precision = 'fp8': .*'float64', 'float32' or 'bf16'"),
        ("model.name=resnet51", r"model.name = 'resnet51'"),
        ("machine.threads", r"--set machine.threads: expected key=value"),
        ("seed.x=1", r"--set seed.x=1: seed is a value, not a section"),
    ],
)
def test_refused_with_key_and_value(setting, says):
    with pytest.raises(RequestError, match=says):
        recipes.read("goyal-resnet50", ["seed=0", setting])


@pytest.mark.parametrize(
    "settings, says",
    [
        (["determinism=any-ranks", "machine.workers_per_pass=2"], "machine.workers_per_pass = 2"),
        (["determinism=any-ranks", "machine.threads=2"], "machine.threads = 2"),
        (["determinism=any-ranks", "wire=fp16"], "wire = fp16"),
        (["determinism=same-ranks", "machine.reduction=fusion"], "machine.reduction = fusion"),
        (["determinism=same-ranks", "machine.allreduce=hierarchical"], "machine.allreduce = hierarchical"),
    ],
)
def test_determinism_refuses_what_would_break_it(settings, says):
    with pytest.raises(RequestError, match=says):
        recipes.read("goyal-resnet50", settings)


def test_all_problems_at_once_and_one_line_each():
    with pytest.raises(RequestError) as caught:
        recipes.read("goyal-resnet50", ["seed=-1", "optim.base_lr=0", "batch.workers=0"])
    assert len(str(caught.value).splitlines()) == 3


def test_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(RequestError, match="goyal-resnet51.*fashion-mnist, .*goyal-resnet50"):
        recipes.read("goyal-resnet51")


def test_machine_part_is_not_fingerprinted():
    base = recipes.read("goyal-resnet50").fingerprint()
    same = ["machine.workers_per_pass=4", "train.max_steps=3", "checkpoint.minutes=1", "data.train=/elsewhere",
            "batch.bn_group=32"]  # fmt: skip
    assert recipes.read("goyal-resnet50", same).fingerprint() == base
    for setting in ("seed=1", "optim.base_lr=0.2", "batch.bn_group=16", "precision=float32", "train.epochs=91"):
        assert recipes.read("goyal-resnet50", [setting]).fingerprint() != base


def test_per_rank_is_settled_once():
    recipe = recipes.read("goyal-resnet50").with_workers(16)
    assert recipe.batch.workers == 16
    assert recipe.with_workers(99).batch.workers == 16
    assert recipes.validate(__import__("yaml").safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_are_valid(name):
    assert recipes.read(name).with_workers(8).build_schedule(1_281_167).steps > 0
