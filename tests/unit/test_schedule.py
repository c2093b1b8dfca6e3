"""The schedule against PAPERS' numbers: Goyal et al. 2017, sections 2.2 and 5.1."""

import math

import pytest

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory.scaling import (
    accumulator_warmin_epochs,
    noise_scale,
    noise_scale_exact,
    required_gbit_per_s,
    scaled_lr,
)
from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup

IMAGENET = 1_281_167


def goyal(workers: int) -> Schedule:
    return recipes.read("goyal-resnet50", [f"batch.workers={workers}"]).build_schedule(IMAGENET)


def test_goyal_8k_every_step():
    """kn = 8192: 156 iterations an epoch, 0.1 -> 3.2 by a constant increment a step, then 30/60/80."""
    schedule = goyal(256)
    assert schedule.steps == 90 * 156 == 14_040
    assert schedule.warmup_steps == 5 * 156
    for step in range(schedule.steps):
        point = schedule.at(step)
        epoch = step // 156
        if step < 780:
            expected = 0.1 + (3.2 - 0.1) * step / 780
        else:
            expected = 3.2 / 10 ** sum(epoch >= m for m in (30, 60, 80))
        assert point.lr == expected, step
        assert (point.epoch, point.step_in_epoch, point.count, point.global_batch) == (epoch, step % 156, 8192, 8192)
        assert point.first == (step % 156) * 8192
    assert schedule.at(0).lr == 0.1
    assert schedule.at(780).lr == 3.2


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16, 32])
def test_goyal_any_nodes(nodes):
    schedule = goyal(8 * nodes)
    kn = 256 * nodes
    assert schedule.steps == 90 * (IMAGENET // kn)
    assert schedule.at(schedule.warmup_steps).lr == 0.1 * kn / 256
    assert schedule.at(0).lr == 0.1
    assert [s.first_epoch for s in schedule.stages] == [0, 30, 60, 80]


def test_below_the_reference_batch_nothing_warms_up():
    schedule = recipes.read("goyal-resnet50", ["batch.workers=4"]).build_schedule(IMAGENET)
    assert schedule.at(0).lr == schedule.at(5000).lr == 0.05


def test_partial_tail_keeps_the_learning_rate():
    schedule = Schedule(203, 8, [Stage(0, 16, 0.5, 0.9)], 3, "partial", Warmup(0, 0.1))
    assert schedule.steps == 6
    tail = schedule.at(1)
    assert (tail.first, tail.count) == (128, 75)
    assert tail.lr == 0.5 and tail.share == 75 / 128
    assert [tail.worker_range(j) for j in (0, 8, 9, 10, 15)] == [
        (128, 136),
        (192, 200),
        (200, 203),
        (203, 203),
        (203, 203),
    ]


def test_dropped_tail_and_cap():
    schedule = Schedule(203, 8, [Stage(0, 16, 0.5, 0.9)], 3, "drop", Warmup(0, 0.1), max_steps=2)
    assert (schedule.full_steps, schedule.steps) == (3, 2)
    assert schedule.at(2).count == 128


def test_cosine_ends_at_zero_and_fractional_warmup():
    schedule = Schedule(1000, 10, [Stage(0, 10, 1.0, 0.9, "cosine")], 4, "drop", Warmup(1.5, 0.2))
    assert schedule.warmup_steps == 15
    assert schedule.at(14).lr == pytest.approx(0.2 + 0.8 * 14 / 15)
    assert schedule.at(15).lr == 1.0
    assert schedule.at(39).lr == pytest.approx(0.5 * (1 + math.cos(math.pi * (3.9 - 1.5) / 2.5)))


def test_growing_batch_counts_steps_by_stage():
    """Smith et al. 2018, CIFAR-10: 128 -> 640 -> 3200 -> 5120 at epochs 60, 120, 160: 29,040 updates."""
    stages = [Stage(e, k, 0.1, 0.9) for e, k in ((0, 1), (60, 5), (120, 25), (160, 40))]
    schedule = Schedule(50_000, 128, stages, 200, "drop", Warmup(0, 0.1))
    assert schedule.steps == 60 * 390 + 60 * 78 + 40 * 15 + 40 * 9 == 29_040
    assert schedule.at(60 * 390).global_batch == 640
    assert schedule.at(60 * 390 - 1).global_batch == 128
    assert schedule.at(29_039).epoch == 199
    with pytest.raises(IndexError):
        schedule.at(29_040)


def test_scaling_and_noise():
    assert scaled_lr(0.1, 256, 8192) == 3.2
    assert scaled_lr(0.1, 256, 8192, "sqrt") == pytest.approx(0.1 * math.sqrt(32))
    starts = [(0.1, 0.9, 128), (0.5, 0.9, 640), (0.5, 0.98, 3200)]
    assert [noise_scale(e, m, b, 50_000) for e, m, b in starts] == pytest.approx([390.625] * 3)
    exact = [round(noise_scale_exact(e, m, b, 50_000), 1) for e, m, b in starts]
    assert exact == [389.6, 385.6, 365.6]
    assert accumulator_warmin_epochs(3200, 50_000, 0.98) == pytest.approx(3.2)
    assert required_gbit_per_s(100_000_000, 0.125) == pytest.approx(12.8)


def test_a_batch_larger_than_the_data_is_refused_when_dropping():
    with pytest.raises(RequestError, match=r"batch.workers = 256 .* 8192"):
        goyal_small = recipes.read("goyal-resnet50", ["batch.workers=256", "data.samples=null"])
        goyal_small.build_schedule(5000)


@pytest.mark.parametrize(
    "samples, workers, n, every", [(203, 16, 8, 100), (32 * 99, 4, 8, 99), (130, 4, 8, 5), (40, 4, 8, 2)]
)
def test_the_noise_scale_is_measured_at_the_first_full_step_of_each_interval(samples, workers, n, every):
    """For no batch is nothing measured: a tail only puts it off."""
    schedule = Schedule(samples, n, [Stage(0, workers, 0.1, 0.9)], 300, "partial", Warmup(0, 0.1), None, every)
    points = [schedule.at(s) for s in range(400)]
    for start in range(0, 400 - every, every):
        full = [p.step for p in points[start : start + every] if p.count == p.global_batch]
        assert [p.step for p in points[start : start + every] if p.measured] == full[:1]
    alone = Schedule(samples, n, [Stage(0, 1, 0.1, 0.9)], 300, "partial", Warmup(0, 0.1), None, every)
    assert not any(alone.at(s).measured for s in range(400))
