"""Sums as whole numbers of a unit, on one rank: what the unit may not change."""

import torch
from test_workers import CPU, engine, point_of, run_steps, small_recipe  # noqa: F401

from hpc_lbsgd.train import step
from hpc_lbsgd.train.replica import Replica


def test_statistics_do_not_follow_the_unit_of_gradients(engine):  # noqa: F811
    """Many BatchNorm groups and a coarse fixed point: counts in units of 2^-6 and small variances survive."""
    found = {}
    for bits in (8, 40):
        recipe = small_recipe(determinism="any-ranks", fixed_point_bits=bits, batch__bn_group=1, optim__base_lr=1e-9)
        replica, (outcome,) = run_steps(engine, recipe, counts=(32,))
        found[bits] = {n: b.clone() for n, b in replica.model.named_buffers()}
        assert outcome.finite and outcome.flushed is not None
    for name, value in found[40].items():
        torch.testing.assert_close(found[8][name], value, rtol=1e-6, atol=1e-7)
        assert not name.endswith("num_batches_tracked") or value == 1


def test_the_cross_checks_own_pass_is_not_counted(engine):  # noqa: F811
    """A worker computed twice adds nothing to what the step says of itself."""
    seen = []
    for every in (0, 1):
        recipe = small_recipe(determinism="any-ranks", machine__cross_check_steps=every)
        replica = Replica(recipe, 5, engine, CPU)
        point = point_of()
        step.Stepper(replica, recipe, batches_checked(recipe, point), partners=[0]).run(point)
        seen.append(replica.buckets.flushed.tolist())
    assert seen[0] == seen[1] and seen[0][0] > 0


def batches_checked(recipe, point):
    torch.manual_seed(0)
    x, y = torch.randn(point.count, 1, 12, 12), torch.randint(0, 5, (point.count,))
    for work in step.Passes(recipe, 0, 1, [0]).at(point):
        where = torch.cat([torch.arange(*point.worker_range(j)) for j in work.workers])
        yield x[where], y[where], 0
