"""Steps whose outcome is read late, as on GPUs, give what steps that are read at once give: on a CPU that is told to
read late."""

from dataclasses import replace

import pytest
import torch
from test_workers import CPU, batches, engine, point_of, small_recipe  # noqa: F401

from hpc_lbsgd.train import optim, step
from hpc_lbsgd.train.replica import Replica, weights_sha256

STEPS = 9
WAYS = {
    "sgd": {}, "fused": {}, "v-form": {"optim__form": "v"}, "lars": {"optim__name": "lars"},
    "adam": {"optim__name": "adam"}, "torch's": {"optim__name": "adamw", "optim__base_lr": 0.01},
    "average": {"train__ema_decay": 0.9}, "any-ranks": {"determinism": "any-ranks"},
    "int32": {"determinism": "any-ranks", "fixed_point": "int32"}, "fp16": {"wire": "fp16"},
}  # fmt: skip
READ_AT_ONCE = ("torch's", "int32")


def lr_of(number):
    return 0.2 / (1 + number)


def trained(engine, way, late, bad=(), measured=()):  # noqa: F811
    """(all that a run leaves, its outcomes, how many of them were read late). Told of a bad step, it is skipped."""
    recipe = small_recipe(**WAYS[way])
    replica = Replica(recipe, 5, engine, CPU)
    if way == "fused":
        replica.optimizer.fused = True
    points = [replace(point_of(number=i, lr=lr_of(i)), measured=i in measured) for i in range(STEPS)]

    def made():
        for i, point in enumerate(points):
            for images, labels, _ in batches(recipe, point, i):
                yield (images.index_fill(0, torch.tensor([0]), float("nan")) if i in bad else images), labels, 0

    stepper, skipped, outcomes, updates = step.Stepper(replica, recipe, made()), [], [], []
    stepper._late = late
    update = replica.update
    replica.update = lambda point, before, ok=None: (updates.append(ok), update(point, before, ok))

    def previous_lr(number):
        taken = [i for i in range(number) if i not in skipped]
        return lr_of(taken[-1]) if taken else 0.0

    seen = []
    for outcome in stepper.outcomes(points, previous_lr):
        if not outcome.finite:
            skipped.append(outcome.point.step)
            replica.optimizer.skipped = len(skipped)
        seen.append(weights_sha256(replica.model))  # what a checkpoint would have
        outcomes.append({k: v for k, v in vars(outcome).items() if not k.endswith("_s")})
    assert skipped == list(bad)
    kept = replica.optimizer.state()
    kept = kept["state"] if "groups" in kept else kept
    left = [replica.running.flat, replica.running.batches, *(v for named in kept.values() for v in named.values())]
    left += replica.average.flats if replica.average else []
    return (seen, left, replica.exponents), outcomes, sum(ok is not None for ok in updates)


@pytest.mark.parametrize("way, bad", [("sgd", ()), *((way, (0, 3, 4, 8)) for way in WAYS)])
def test_late_is_at_once_to_the_bit(engine, way, bad):  # noqa: F811
    (seen, left, units), outcomes, late = trained(engine, way, True, bad, measured=(5,))
    (expected, there, own), at_once, none = trained(engine, way, False, bad, measured=(5,))
    assert (late, none) == (0 if way in READ_AT_ONCE else STEPS - 1, 0)  # a measured step is read at once
    assert seen == expected and len(set(seen)) == STEPS - len(bad) + (0 in bad)
    assert units == own and len(left) == len(there)
    assert all(torch.equal(a, b) for a, b in zip(left, there, strict=True))
    for found, known in zip(outcomes, at_once, strict=True):
        assert repr(found) == repr(known)  # a loss that is NaN is itself


def test_a_step_is_read_when_the_next_one_has_begun_and_before_its_update(engine):  # noqa: F811
    recipe = small_recipe()
    replica, told = Replica(recipe, 5, engine, CPU), []
    points = [point_of(number=i) for i in range(4)]
    made = (batch for i, point in enumerate(points) for batch in batches(recipe, point, i))
    stepper = step.Stepper(replica, recipe, made)
    stepper._late = True
    begin, update = stepper._begin, replica.update
    stepper._begin = lambda point, *more: (begin(point, *more), told.append(("begun", point.step)))
    replica.update = lambda point, *more: (told.append(("update", point.step)), update(point, *more))
    for outcome in stepper.outcomes(points, settles=lambda number: number == 2):
        told.append(("read", outcome.point.step))
    assert told == [
        ("begun", 0), ("update", 0), ("begun", 1), ("read", 0), ("update", 1), ("begun", 2), ("read", 1),
        ("update", 2), ("read", 2), ("begun", 3), ("update", 3), ("read", 3),
    ]  # fmt: skip


def test_what_is_given_up_changes_nothing(engine):  # noqa: F811
    """Stopped after a step while the next one's sums are under way; the engine takes further steps."""
    recipe = small_recipe()
    replica, points = Replica(recipe, 5, engine, CPU), [point_of(number=i) for i in range(6)]
    made = [[*batches(recipe, point, i)] for i, point in enumerate(points)]
    stepper = step.Stepper(replica, recipe, (batch for step in made for batch in step))
    stepper._late = True
    outcomes = stepper.outcomes(points)
    first = next(outcomes)
    there = weights_sha256(replica.model)
    stepper.drop()
    stepper.drop()
    assert first.point.step == 0 and weights_sha256(replica.model) == there
    again = step.Stepper(replica, recipe, (batch for step in made[1:] for batch in step))
    rest = [outcome.loss for outcome in again.outcomes(points[1:])]
    straight = Replica(recipe, 5, engine, CPU)
    whole = step.Stepper(straight, recipe, (batch for step in made for batch in step))
    assert [first.loss, *rest] == [outcome.loss for outcome in whole.outcomes(points)]


def test_a_masked_step_leaves_zeros_their_signs():
    """-0 + 0 is 0: a step that is masked by arithmetic would change them."""
    weights = torch.tensor([-0.0, 0.0, 1.0])
    average = optim.Average([weights], 0.5)
    average.update(torch.tensor(False))
    assert torch.equal(average.flats[0].signbit(), weights.signbit())
