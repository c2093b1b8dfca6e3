"""Smith et al. 2018: update counts, noise scales and capped steps, to the last digit."""

import pytest

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.outline import outline, warnings
from hpc_lbsgd.theory.schedule import capped_step

CIFAR, IMAGENET = 50_000, 1_281_167


@pytest.mark.parametrize(
    "name, samples, updates",
    [
        ("cifar10-original", CIFAR, 78_000),
        ("cifar10-increasing-batch", CIFAR, 29_040),
        ("cifar10-initial-lr", CIFAR, 6_300),
        ("cifar10-momentum", CIFAR, 2_160),
        ("imagenet-decaying-lr", IMAGENET, 14_040),
        ("imagenet-increasing-batch", IMAGENET, 5_580),
        ("imagenet-m90", IMAGENET, 5_820),
        ("imagenet-m95", IMAGENET, 3_480),
        ("imagenet-m975", IMAGENET, 2_310),
    ],
)
def test_update_counts(name, samples, updates):
    schedule = recipes.read(f"smith-{name}").build_schedule(samples)
    assert schedule.steps == updates
    assert schedule.at(updates - 1).epoch == schedule.epochs - 1


def stages_of(name, samples):
    recipe = recipes.read(f"smith-{name}")
    return outline(recipe, recipe.build_schedule(samples), 8)["stages"]


def test_three_starts_share_one_noise_scale():
    starts = [stages_of(f"cifar10-{n}", CIFAR)[0] for n in ("increasing-batch", "initial-lr", "momentum")]
    assert [s["noise_scale"] for s in starts] == pytest.approx([390.625] * 3, rel=1e-12)
    assert [round(s["noise_scale_exact"], 1) for s in starts] == [389.6, 385.6, 365.6]
    imagenet = [stages_of(f"imagenet-{n}", IMAGENET)[0]["noise_scale"] for n in ("m90", "m95", "m975")]
    assert [round(g, 1) for g in imagenet] == [4691.8] * 3


@pytest.mark.parametrize("name, samples, factor", [
    ("cifar10-increasing-batch", CIFAR, 5), ("imagenet-m90", IMAGENET, 10), ("cifar10-original", CIFAR, 5),
])  # fmt: skip
def test_each_step_divides_the_noise_scale(name, samples, factor):
    scales = [s["noise_scale"] for s in stages_of(name, samples)]
    assert all(a / b == pytest.approx(factor, rel=1e-12) for a, b in zip(scales, scales[1:], strict=False))


def test_capped_steps():
    assert [(s["global_batch"], round(s["lr"], 12)) for s in stages_of("imagenet-m90", IMAGENET)] == [
        (8192, 3.0), (65536, 2.4), (65536, 0.24), (65536, 0.024)]  # fmt: skip
    found = [(s["global_batch"], round(s["lr"], 12)) for s in stages_of("cifar10-increasing-batch", CIFAR)]
    assert found == [(128, 0.1), (640, 0.1), (3200, 0.1), (5120, 0.032)]
    assert capped_step(3200, 0.1, 5, 5120) == pytest.approx((5120, 0.032))
    assert capped_step(128, 0.1, 5, None) == (640, 0.1)


def test_hybrid_grows_once_then_decays():
    recipe = recipes.read("smith-cifar10-original", ["schedule.kind=hybrid"])
    stages = outline(recipe, recipe.build_schedule(CIFAR), 1)["stages"]
    assert [(s["global_batch"], round(s["lr"], 12)) for s in stages] == [
        (128, 0.1),
        (640, 0.1),
        (640, 0.02),
        (640, 0.004),
    ]


def test_the_batch_grows_by_workers_only():
    recipe = recipes.read("smith-cifar10-increasing-batch")
    schedule = recipe.build_schedule(CIFAR)
    points = [schedule.at(schedule.first_step(e)) for e in (0, 60, 120, 160)]
    assert [p.workers for p in points] == [1, 5, 25, 40]
    assert {p.samples_per_worker for p in points} == {128}


def test_warnings():
    found = warnings(
        recipes.read("smith-cifar10-momentum"), recipes.read("smith-cifar10-momentum").build_schedule(CIFAR)
    )
    assert any("fills its buffer in 3.2 epochs" in w for w in found) and any("N/10 = 5000" in w for w in found)
    goyal = recipes.read("goyal-resnet50", ["batch.workers=512"])
    schedule = goyal.build_schedule(IMAGENET)
    assert any("kn = 16384, above 8192" in w for w in warnings(goyal, schedule))
    assert any("above the critical batch 9000" in w for w in warnings(goyal, schedule, 9000))
    small = recipes.read("goyal-resnet50", ["batch.workers=512", "batch.last_batch=partial"])
    assert any("kn = 16384 is more than N = 9000" in w for w in warnings(small, small.build_schedule(9000)))
    alone = recipes.read("goyal-resnet50", ["batch.workers=1"])
    assert any("k = 1: the noise scale is not measured" in w for w in warnings(alone, alone.build_schedule(IMAGENET)))
    calm = recipes.read("goyal-resnet50", ["batch.workers=256"])
    assert warnings(calm, calm.build_schedule(IMAGENET)) == []


@pytest.mark.parametrize("setting, says", [
    ("schedule.max_batch=64", "schedule.max_batch = 64 must be a multiple of batch.samples_per_worker = 128"),
    ("batch.workers=80", "schedule.max_batch = 5120 is below the batch that the run starts with, 10240"),
    ("schedule.factor=2.5", "schedule.factor = 2.5: the batch grows by whole workers"),
])  # fmt: skip
def test_batches_that_cannot_grow_are_refused(setting, says):
    with pytest.raises(RequestError, match=says):
        recipes.read("smith-cifar10-increasing-batch", [setting]).build_schedule(CIFAR)


@pytest.mark.parametrize("setting, says", [
    ("schedule.factor=1", r"schedule.factor = 1: .*greater than 1"),
    ("optim.momentum=1", r"optim.momentum = 1: .*less than 1"),
    ("schedule.milestones=[60,60]", r"schedule.milestones = \[60, 60\] must rise"),
    ("batch.bn_group=100", r"batch.bn_group = 100 must divide batch.samples_per_worker = 128"),
    ("schedule.kind=cosine", r"schedule.max_batch = 5120 has no meaning for schedule.kind = cosine"),
])  # fmt: skip
def test_refused_before_anything_is_built(setting, says):
    with pytest.raises(RequestError, match=says):
        recipes.read("smith-cifar10-increasing-batch", [setting])


def test_other_schedules():
    base = ["batch.workers=4", "schedule.warmup=none", "train.epochs=90"]
    slow = recipes.read("goyal-resnet50", [*base, "schedule.kind=slow-start", "schedule.milestones=[]"])
    schedule = slow.build_schedule(IMAGENET)
    rates = [schedule.at(schedule.first_step(e)).lr / slow.peak_lr() for e in (0, 39, 40, 70, 85, 89)]
    assert rates == pytest.approx([0.5, 0.5, 0.075, 0.01, 0.001, 0.001])
    poly = recipes.read("goyal-resnet50", [*base, "schedule.kind=polynomial", "schedule.milestones=[]"])
    schedule = poly.build_schedule(IMAGENET)
    assert schedule.at(schedule.first_step(45)).lr == pytest.approx(poly.peak_lr() / 4)
    constant = recipes.read("goyal-resnet50", ["batch.workers=256", "schedule.warmup=constant"])
    schedule = constant.build_schedule(IMAGENET)
    assert [schedule.at(s).lr for s in (0, 779, 780)] == [0.1, 0.1, 3.2]
