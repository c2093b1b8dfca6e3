"""`lb.load`: steps go on under the seeds and the schedule that the file's were of, or are refused by name."""

import math

import numpy as np
import pytest
import torch
from test_api import N, sgd, small_data, small_model, small_schedule, train
from test_api_habits import distributed

import hpc_lbsgd as lb
from hpc_lbsgd.api import result_part
from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup
from hpc_lbsgd.train.replica import weights_sha256

pytestmark = pytest.mark.usefixtures("world")


def go(run, steps, start=0, schedule=None, seed=1):
    train(run, lb.GlobalShuffle(N, schedule or small_schedule(), seed=seed, start=start), small_data(), steps=steps)
    return weights_sha256(run.model)


@pytest.fixture
def file(tmp_path):
    """Two steps."""
    run = distributed()
    go(run, 2)
    lb.save(tmp_path / "state.pt", run)
    return tmp_path / "state.pt"


OTHER = {
    "shuffle seed": ({"seed": 2}, "lb.GlobalShuffle.seed. = 1, and this is 2"),
    "lr": ({"schedule": small_schedule(lr=0.2)}, r"schedule.lr = \[0.1\], and this is \[0.2\]"),
    "workers": ({"schedule": small_schedule(workers=8)}, r"schedule.workers = \[4\], and this is \[8\]"),
    "n": ({"schedule": small_schedule(samples_per_worker=4)}, "schedule.samples_per_worker = 8, and this is 4"),
    "epochs": ({"schedule": small_schedule(epochs=4)}, "schedule.epochs = 3, and this is 4"),
    "milestone": ({"schedule": small_schedule(milestones=(2,))}, r"schedule.stages = \[0\], and this is \[0, 14\]"),
    "shape": ({"schedule": small_schedule(shape="cosine")}, "schedule.lr at step"),
    "tail": ({"schedule": small_schedule(last_batch="drop")}, "schedule.last_batch = partial, and this is drop"),
    "momentum": ({"schedule": small_schedule(momentum=0.8)}, "schedule.momentum"),
    "warm-up": ({"schedule": small_schedule(warmup_start_lr=0.05)}, "schedule.lr at step 0 = 0.025, and this is 0.05"),
}


@pytest.mark.parametrize("what", OTHER)
def test_steps_under_another_seed_or_schedule_are_refused_by_name(file, what):
    more, said = OTHER[what]
    run = distributed()
    start = lb.load(file, run)
    before = weights_sha256(run.model)
    with pytest.raises(lb.RequestError, match=rf"lb.load\(.*state.pt\).*{said}.*amend=True"):
        go(run, 3, start, **more)
    assert weights_sha256(run.model) == before and run.step == 2
    assert go(run, 3, start) == go(distributed(), 3)  # what was refused left no trace


@pytest.mark.parametrize(
    "given, said",
    [
        ({"seed": 2}, r"lb.distribute.seed. = 1, and this is 2"),
        ({"bn_group": 4}, "bn_group. = 8, and this is 4"),
        ({"fixed_point_bits": 30}, "fixed_point_bits. = 40, and this is 30"),
    ],
)
def test_so_are_those_of_another_distribute(file, given, said):
    model = small_model()
    run = lb.distribute(model, sgd(model), **{"seed": 1} | given)
    start = lb.load(file, run)
    lb.evaluate(run, small_data(), {})  # nothing goes on yet
    with pytest.raises(lb.RequestError, match=said):
        go(run, 3, start)


def test_what_changes_no_result_may_be_another(file):
    """A cap, measurements, n said as the default of bn_group; and a schedule that was made by other words."""
    model = small_model()
    run = lb.distribute(model, sgd(model), seed=1, bn_group=8, bucket_mb=1)
    start = lb.load(file, run)
    stage = Stage(0, np.int64(4), np.float64(0.1), 0.9)
    same = Schedule(N, np.int64(8), [stage], 3, "partial", Warmup(1, 0.025), max_steps=9, measure_every=5)
    assert go(run, 4, start, same, seed=np.int64(1)) == go(distributed(), 4)
    lb.save(file, run)
    assert go(distributed(), 5) == go(run, 5, lb.load(file, run))


def test_one_word_goes_on_and_the_next_file_is_of_what_it_went_on_with(file, tmp_path):
    run, later = distributed(), small_schedule(lr=0.2)
    start = lb.load(file, run, amend=True)
    lb.save(tmp_path / "unchanged.pt", run)  # no step was taken of another
    go(run, 3, start, later, seed=2)
    lb.save(file, run)
    run = distributed()
    with pytest.raises(lb.RequestError, match="seed. = 2, and this is 1"):
        go(run, 4, lb.load(file, run), later, seed=1)
    go(run, 4, lb.load(file, run), later, seed=2)
    with pytest.raises(lb.RequestError, match="seed. = 1, and this is 2"):
        go(run, 3, lb.load(tmp_path / "unchanged.pt", run), later, seed=2)


def test_weights_alone_begin_anything(file):
    run = distributed()
    lb.load(file, run)
    run.step = 0
    go(run, 1, 0, small_schedule(lr=0.3), seed=9)


def test_a_function_of_the_epoch_is_compared_by_what_it_gives(tmp_path):
    def schedule(power):
        return Schedule(N, 8, [Stage(0, 4, 0.1, 0.9, lambda e: math.exp(-power * e))], 3, "partial", Warmup(0, 0.1))

    run = distributed()
    go(run, 2, schedule=schedule(1))
    lb.save(tmp_path / "state.pt", run)
    run = distributed()
    with pytest.raises(lb.RequestError, match="schedule.lr at step 1 = "):
        go(run, 3, lb.load(tmp_path / "state.pt", run), schedule(1.001))
    go(run, 3, lb.load(tmp_path / "state.pt", run), schedule(1 + 1e-13))  # another machine's exp


def test_a_file_from_before_goes_on_and_says_that_it_is_not_known(file, recwarn):
    content = torch.load(file, weights_only=True)
    del content["result_part"]
    torch.save(content, file)
    run = distributed()
    start = lb.load(file, run)
    lb.evaluate(run, small_data(), {})
    assert not recwarn
    go(run, 4, start, seed=2)
    assert ["state.pt): has no seeds and no schedule" in str(w.message) for w in recwarn] == [True]
    lb.save(file, run)
    with pytest.raises(lb.RequestError, match="seed. = 2, and this is 1"):
        go(run, 5, lb.load(file, run), seed=1)
    torch.save(content | {"result_part": ["what", "lb.save", "never wrote"]}, file)
    with pytest.raises(lb.RequestError, match="was not written by lb.save"):
        lb.load(file, run)


def test_a_file_of_no_steps_asks_nothing(tmp_path, recwarn):
    run = distributed()
    lb.save(tmp_path / "state.pt", run)
    go(run, 1, lb.load(tmp_path / "state.pt", run), small_schedule(lr=0.2), seed=5)
    assert not recwarn


def test_another_warm_up_is_seen_in_a_long_schedule():
    """It is over before the second of the points that lie evenly."""
    common = {"samples": 1_281_167, "workers": 256, "samples_per_worker": 32, "epochs": 90, "lr": 3.2}
    known = [
        result_part.of_schedule(lb.Schedule(**common, warmup_start_lr=0.1, warmup_epochs=epochs))
        for epochs in (0.2, 0.5, 1, 1.3)
    ]
    assert all(a != b for i, a in enumerate(known) for b in known[:i])


@pytest.mark.parametrize("lr", [1, 1.0, np.float64(1), np.float32(1)])
def test_a_learning_rate_is_one_number_however_it_is_written(lr, tmp_path):
    schedules = [Schedule(N, 8, [Stage(0, 4, value, 0.5)], 3, "partial", Warmup(0, 0.1)) for value in (lr, 1.0)]
    for number, (before, after) in enumerate((schedules, schedules[::-1])):
        run = distributed()
        go(run, 2, schedule=before)
        lb.save(tmp_path / str(number), run)
        run = distributed()
        go(run, 3, lb.load(tmp_path / str(number), run), schedule=after)


def test_a_step_that_was_begun_and_not_taken_is_none_of_the_files(tmp_path):
    run = distributed()
    go(run, 2)
    other = lb.GlobalShuffle(N, small_schedule(lr=0.3), seed=7, start=2)
    step = next(other.steps(torch.utils.data.DataLoader(small_data(), batch_sampler=other)))
    with pytest.raises(KeyError), run.part(next(iter(step.workers))):
        raise KeyError
    lb.save(tmp_path / "state.pt", run)
    run = distributed()
    go(run, 3, lb.load(tmp_path / "state.pt", run))
    assert not result_part.same(10**400, 1.0)  # of a file
