"""Whole steps of one process: averaged weights, users' losses, what is measured, and what may not change."""

import pytest
import torch
import torch.nn.functional as F
from test_workers import CPU, engine, point_of, small_recipe  # noqa: F401
from torch import nn

from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.train import models, step
from hpc_lbsgd.train.replica import Replica


def test_averaged_weights_have_averaged_statistics(engine):  # noqa: F811
    recipe = small_recipe(train__ema_decay=0.5)
    replica = Replica(recipe, 5, engine, CPU)
    expected = None
    for i in range(3):
        point = point_of(number=i)
        torch.manual_seed(i)
        x, y = torch.randn(32, 1, 12, 12) + i, torch.randint(0, 5, (32,))
        stepper = step.Stepper(replica, recipe, iter([(x[j : j + 8], y[j : j + 8], 0) for j in range(0, 32, 8)]))
        if expected is None:
            expected = {k: v.clone() for k, v in replica.model.state_dict().items()}
        stepper.run(point)
        for name, value in replica.model.state_dict().items():
            if value.is_floating_point():
                expected[name].lerp_(value, 0.5)
    averaged = replica.averaged()
    assert {"stem.1.running_mean", "stem.1.running_var", "fc.weight"} <= averaged.keys()
    for name, value in averaged.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    before = {k: v.clone() for k, v in replica.model.state_dict().items()}
    replica.average.swap()
    torch.testing.assert_close(replica.model.state_dict()["stem.1.running_mean"], expected["stem.1.running_mean"])
    replica.average.swap()
    assert all(torch.equal(before[k], v) for k, v in replica.model.state_dict().items())


def scalar_loss(outputs, labels):
    return F.cross_entropy(outputs, labels)


def test_a_loss_that_is_a_mean_is_refused(engine):  # noqa: F811
    recipe = small_recipe(train__loss="test_step:scalar_loss")
    replica = Replica(recipe, 5, engine, CPU)
    x, y = torch.randn(8, 1, 12, 12), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(RequestError, match=r'returned shape \(\) for 8 samples.*reduction="none"'):
        step.Stepper(replica, recipe, iter([(x, y, 0)])).run(point_of())


@pytest.mark.parametrize("scale_bits", [0, -18, -40, 40])
def test_the_noise_scale_does_not_see_the_size_of_the_loss(engine, scale_bits, monkeypatch):  # noqa: F811
    """Gradients times 2^s: trace and |G|^2 times 2^2s, and a positive ratio."""
    from dataclasses import replace

    from hpc_lbsgd.train import losses

    found = []
    for bits in (0, scale_bits):
        monkeypatch.setattr(losses, "scaled", lambda o, y, b=bits: F.cross_entropy(o, y, reduction="none") * 2.0**b,
                            raising=False)  # fmt: skip
        recipe = small_recipe(train__loss="hpc_lbsgd.train.losses:scaled", precision="float64")
        replica = Replica(recipe, 5, engine, CPU)
        torch.manual_seed(0)
        x, y = torch.randn(32, 1, 12, 12, dtype=torch.float64), torch.randint(0, 5, (32,))
        parts = iter([(x[j : j + 8], y[j : j + 8], 0) for j in range(0, 32, 8)])
        outcome = step.Stepper(replica, recipe, parts).run(replace(point_of(lr=1e-9), measured=True))
        found.append(outcome.measurement)
    assert found[1].trace > 0
    assert found[1].trace * 4.0**-scale_bits == pytest.approx(found[0].trace, rel=1e-9)
    assert found[1].square * 4.0**-scale_bits == pytest.approx(found[0].square, rel=1e-9)


def test_tokens_stay_whole_numbers(engine, monkeypatch):  # noqa: F811
    """Inputs that are counted are not made floating; float64 data is taken in the precision of the weights."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(10, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.last(self.table(x).mean(1))

    monkeypatch.setitem(models.MODELS, "bag", lambda section, channels, classes: Bag())
    base = small_recipe()
    recipe = base.model_copy(update={"model": base.model.model_copy(update={"name": "bag"})})
    replica = Replica(recipe, 5, engine, CPU)
    assert replica.outputs(torch.randint(0, 10, (4, 7))).shape == (4, 5)
    pictures = Replica(small_recipe(), 5, engine, CPU)
    assert pictures.outputs(torch.randn(4, 1, 12, 12, dtype=torch.float64)).dtype == torch.float32


def test_a_parameter_that_is_a_slice_of_something_larger_keeps_to_its_place(engine, monkeypatch):  # noqa: F811
    """Its stride has gaps; in a bucket it must not reach into its neighbours."""

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(144, 8), nn.Linear(8, 5)
            self.middle = nn.Parameter((torch.randn(8, 16) * 0.1)[:, :8])

        def forward(self, x):
            return self.last(self.first(x.flatten(1)) @ self.middle)

    monkeypatch.setitem(models.MODELS, "sliced", lambda section, channels, classes: Sliced())
    base = small_recipe()
    recipe = base.model_copy(update={"model": base.model.model_copy(update={"name": "sliced"})})
    replica = Replica(recipe, 5, engine, CPU)
    author = models.build(recipe.model, 1, 5, recipe.seed)
    assert not author.middle.is_contiguous()
    for name, value in author.state_dict().items():
        assert torch.equal(replica.model.state_dict()[name], value), name


def test_what_its_author_froze_stays_frozen(engine, monkeypatch):  # noqa: F811
    """eval() where the model is made; through training, an evaluation, and training again."""

    def make(section, channels, classes):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, classes))
        model[1].eval()
        return model

    monkeypatch.setitem(models.MODELS, "frozen", make)
    base = small_recipe()
    recipe = base.model_copy(update={"model": base.model.model_copy(update={"name": "frozen"})})
    replica = Replica(recipe, 5, engine, CPU)
    for _ in range(2):
        replica.train()
        assert replica.model.training and replica.model[0].training and not replica.model[1].training
        replica.model.eval()


def test_state_that_changes_later_is_noticed(engine):  # noqa: F811
    """A buffer or a frozen parameter that no step of ours touches."""
    replica = Replica(small_recipe(), 5, engine, CPU)
    replica.model.register_buffer("scale", torch.ones(3))
    replica.model.fc.weight.data = replica.model.fc.weight.data  # in its bucket as before
    replica.synchronise()
    replica.check_others()
    before = int(replica.digest())
    replica.model.scale[1] *= 0.97
    with pytest.raises(RunError, match="scale was changed since the start"):
        replica.check_others()
    assert int(replica.digest()) != before
    replica.model.scale[1] = 1
    replica.check_others()
    replica.model.fc.bias.requires_grad_(False)
    with pytest.raises(RunError, match=r"requires_grad of fc\.bias was changed since the start, and it still decays"):
        replica.check_others()
