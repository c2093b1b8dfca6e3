"""What a person may change in a run that is under way, and what stays."""

import pytest

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.amend import added, checked, recipe_now, schedule_of
from hpc_lbsgd.errors import RequestError

RECIPE = recipes.validate(
    {
        "batch": {"samples_per_worker": 8, "workers": 4},
        "optim": {"base_lr": 0.1, "base_batch": 32},
        "schedule": {"kind": "decaying-lr", "milestones": [2, 6], "factor": 10, "warmup": "none"},
        "train": {"epochs": 8},
    }
)
EPOCH = 10  # steps, of 320 samples


def test_what_is_in_force_is_not_amended_again():
    """A batch script repeats its words at every requeue, and after a fall back to an older checkpoint."""
    once = added(RECIPE, [], 12, {"optim.base_lr": 0.05}, False)
    assert once == [[12, {"optim.base_lr": 0.05}]]
    for step in (12, 30, 7):
        assert added(RECIPE, once, step, {"optim.base_lr": 0.05}, False) == once
    assert added(RECIPE, [], 12, {"optim.base_lr": 0.1}, False) == []  # as the recipe says
    assert added(RECIPE, once, 12, {"optim.base_lr": 0.05}, True) == once  # no rate is changed after a decision
    more = added(RECIPE, once, 30, {"optim.base_lr": 0.05, "train.epochs": 9}, False)
    assert more == [*once, [30, {"train.epochs": 9}]]


def test_an_amendment_takes_the_place_of_later_ones():
    """The run fell back to step 7, before what was amended at 12: what is said now holds from 7 to the end."""
    before = [[12, {"optim.base_lr": 0.05, "train.epochs": 9}]]
    found = added(RECIPE, before, 7, {"optim.base_lr": 0.02}, False)
    assert found == [[7, {"optim.base_lr": 0.02}], [12, {"train.epochs": 9}]]
    assert recipe_now(RECIPE, found, 12).optim.base_lr == 0.02
    assert before == [[12, {"optim.base_lr": 0.05, "train.epochs": 9}]]


@pytest.mark.parametrize("milestones, refused", [
    ([2, 5], False), ([2], False), ([2, 3, 6], False), ([3, 6], True), ([1, 6], True), ([6], True), ([1, 2, 6], True),
])  # fmt: skip
def test_only_milestones_ahead_move(milestones, refused):
    amendments = [[2 * EPOCH + 5, {"schedule.milestones": milestones}]]
    if refused:
        with pytest.raises(RequestError, match="a milestone that the run has passed stays"):
            schedule_of(RECIPE, 320, [], amendments)
    else:
        assert schedule_of(RECIPE, 320, [], amendments).at(2 * EPOCH + 5).lr == pytest.approx(0.01)
    # at its first step the milestone is still ahead
    assert schedule_of(RECIPE, 320, [], [[2 * EPOCH, {"schedule.milestones": [3, 6]}]]).at(2 * EPOCH).lr == 0.1


@pytest.mark.parametrize("content, says", [
    ({"3": {}}, "expected a list"), ([[3]], "expected"), ([[3, {}], [3, {}]], "by rising step"),
    ([[-1, {}]], "by rising step"), ([[True, {}]], "rising step"), ([[2.5, {}]], "rising step"),
    ([[3, {"seed": 4}]], "seed at step 3 cannot be amended"), ([[3, ["optim.base_lr"]]], "expected"),
])  # fmt: skip
def test_a_file_that_amend_has_not_written_is_refused(content, says):
    with pytest.raises(RequestError, match=rf"amendments.json: .*{says}"):
        checked(content, "amendments.json")


def test_spans_follow_the_seams():
    """What `plan` shows: each stretch of one batch and one rate, as far as it was or will be walked."""
    schedule = schedule_of(RECIPE, 320, [], [[15, {"optim.base_lr": 0.05}], [70, {"train.epochs": 9}]])
    found = [(stage.lr, first, stop) for stage, first, stop in schedule.spans()]
    assert found == [(0.1, 0, 15), (0.05, 15, 20), (0.005, 20, 60), (0.0005, 60, 70), (0.0005, 70, 90)]
    for lr, first, stop in found:
        assert all(schedule.at(step).lr == lr for step in range(first, stop))
