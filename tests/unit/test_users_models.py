"""Models that people bring, one step beside those of this repository: trained as they are, or refused by name."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_layers import Virtual
from test_workers import CPU, batches, engine, point_of, run_steps, small_recipe  # noqa: F401
from torch import nn

from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.train import decide, losses, models, preflight, step, verdict
from hpc_lbsgd.train.replica import Replica


def own_model(monkeypatch, make, **changes):
    """A small recipe with this model in it, as if the user had named it."""
    monkeypatch.setattr(models, "load", lambda name, key: lambda channels, classes: make())
    base = small_recipe(**changes)
    return base.model_copy(update={"model": base.model.model_copy(update={"name": "users:model"})})


def checks(monkeypatch, make, inputs=None, labels=None, **changes):
    """{check: None or what is wrong} of preflight before the replica is laid out."""
    recipe = own_model(monkeypatch, make, **changes)
    torch.manual_seed(0)
    inputs = torch.randn(8, 1, 12, 12) if inputs is None else inputs
    labels = torch.randint(0, 5, (8,)) if labels is None else labels
    found = preflight.before(recipe, 5, {0: (inputs, labels, 0)}, CPU, torch.contiguous_format, True)
    return {c.check: None if c.ok else c.what for c in found.checks}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def body(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, x):
        return self.fc(self.body(x))


# ---------------------------------------------------------------- tensors


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 5)
        self.other.weight.data = self.fc.weight.data


class ViewOfAWeight(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("part", self.fc.weight.data[:2])


class TwoParts(Net):
    """Two parameters side by side in one storage, which do not meet."""

    def __init__(self):
        super().__init__()
        whole = torch.randn(2, 5)
        self.first, self.second = nn.Parameter(whole[0]), nn.Parameter(whole[1])

    def forward(self, x):
        return super().forward(x) * self.first + self.second


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(5, dtype=torch.complex64))


class Extra(Net):
    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        pass


class Words(nn.Module):
    def __init__(self, **more):
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 4, **more), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.table(x).mean(1))


@pytest.mark.parametrize("make, says", [
    (Tied, r"other\.weight and fc\.weight lie in the same memory|fc\.weight and other\.weight lie in the same memory"),
    (ViewOfAWeight, r"part and fc\.weight lie|fc\.weight and part lie"),
    (Complex, r"the model itself \(Complex\) has turn, a complex tensor"),
    (Extra, r"\(Extra\) has get_extra_state"),
    (lambda: Words(max_norm=2.0), r"table \(Embedding\) has max_norm"),
    (lambda: Words(sparse=True), r"table \(Embedding\) has sparse gradients"),
    (lambda: "resnet", "returned str, not a torch module"),
])  # fmt: skip
def test_models_that_would_be_changed_are_refused_at_start(monkeypatch, make, says):
    with pytest.raises(RequestError, match=says):
        models.build(own_model(monkeypatch, make).model, 1, 5, 3)


def test_tensors_that_share_without_harm_are_taken(monkeypatch):
    assert set(checks(monkeypatch, TwoParts).values()) == {None}
    shared = nn.Linear(4, 5)

    def one_layer_twice():
        model = Net()
        model.fc, model.again = shared, shared
        return model

    models.build(own_model(monkeypatch, one_layer_twice).model, 1, 5, 3)


# ---------------------------------------------------------------- forwards


class Conditional(nn.BatchNorm2d):
    """Scaled by a second input, which has a row a sample; called by name too."""

    def forward(self, x, condition, scale=1.0):
        return super().forward(x) * condition[:, :, None, None] * scale


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.plain, self.drop = Conditional(4, affine=False), nn.BatchNorm2d(4), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(input=self.plain(input=self.norm(condition=x.mean((2, 3)), x=x, scale=2.0)))


@pytest.mark.parametrize("counts, group", [([8], 8), ([8, 4], 4)])
def test_layers_with_more_than_one_input(counts, group):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 4, 3, 3, dtype=torch.float64)
    torch.manual_seed(1)
    virtual, plain = Virtual(ByName().double(), group), ByName().double()
    (found,) = virtual.step([(list(range(len(counts))), counts, x)])
    torch.testing.assert_close(found, torch.cat([plain(part) for part in x.split(group)]))


def test_what_groups_cannot_be_told_from_is_said():
    class PerChannel(nn.BatchNorm2d):
        def forward(self, x, scale):
            return super().forward(x) * scale[:, None, None]

    class Pair(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x), x

    layer = PerChannel(8)
    virtual = Virtual(nn.Sequential(layer), 4)
    virtual.model.forward = lambda x: layer(x, torch.ones(8))
    with pytest.raises(RunError, match="may be one a sample or one a channel"):
        virtual.step([([0], [8], torch.randn(8, 8, 2, 2))])
    with pytest.raises(RunError, match=r"0 \(Pair\) returns tuple, and groups are put together from tensors"):
        Virtual(nn.Sequential(Pair(3)), 4).step([([0], [8], torch.randn(8, 3, 2, 2))])


def test_a_dropout_with_its_authors_own_forward_keeps_it(monkeypatch):
    def net():
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.Dropout(0.5))
        model[2].forward = lambda x: x * 3
        return model

    (found,) = Virtual(net()).step([([0], [8], torch.ones(8, 1, 12, 12))])
    assert (found != 0).all()
    assert set(checks(monkeypatch, net).values()) == {None}


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv(x[:, :, None].expand(-1, -1, 4, -1, -1)).mean((2, 3, 4)))


def test_volumes_train_with_the_defaults(engine, monkeypatch):  # noqa: F811
    recipe = own_model(monkeypatch, Volume)
    assert recipe.machine.channels_last
    replica, outcomes = run_steps(engine, recipe)
    assert all(o.finite for o in outcomes) and not replica.channels_last


class InADict(Net):
    def forward(self, x):
        return {"logits": super().forward(x), "parts": (self.fc.weight[0], [self.fc(self.body(x))])}


def test_half_precision_ends_at_the_outputs_whatever_holds_them(engine, monkeypatch):  # noqa: F811
    replica = Replica(own_model(monkeypatch, InADict, precision="bf16"), 5, engine, CPU)
    found = replica.outputs(torch.randn(2, 1, 12, 12))
    assert found["logits"].dtype == found["parts"][1][0].dtype == torch.float32
    assert isinstance(found["parts"], tuple)


@pytest.mark.parametrize("inputs, says", [
    (torch.randint(0, 200, (8, 1, 12, 12)), r"inputs are int64 \(8, 1, 12, 12\), labels int64 \(8,\)"),
    (torch.randn(8, 3, 12, 12), r"expected input\[8, 3, 12, 12\] to have 1 channels"),
])  # fmt: skip
def test_a_first_step_that_fails_is_one_message(monkeypatch, inputs, says):
    with pytest.raises(RequestError, match=r"the first step cannot be computed: RuntimeError") as problem:
        checks(monkeypatch, Net, inputs)
    message = str(problem.value)
    assert re.search(says, message) and "test_users_models.py:" in message


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("way, bits, says", [
    ({"determinism": "any-ranks"}, -38, r"below 2\^-41, and determinism any-ranks .* raise fixed_point_bits \(now 40"),
    ({"wire": "fp16"}, -40, r"below 2\^-35, and wire fp16 .* raise wire_scale_bits \(now 10, at most 24\)"),
])  # fmt: skip
def test_gradients_that_are_lost_on_the_way_are_counted(engine, monkeypatch, way, bits, says):  # noqa: F811
    shares = []
    for scale in (1.0, 2.0**bits):
        monkeypatch.setattr(losses, "scaled", lambda o, y, s=scale: F.cross_entropy(o, y, reduction="none") * s,
                            raising=False)  # fmt: skip
        recipe = small_recipe(train__loss="hpc_lbsgd.train.losses:scaled", **way)
        replica = Replica(recipe, 5, engine, CPU)
        shares.append(step.Stepper(replica, recipe, batches(recipe, point_of())).run(point_of()).flushed)
    assert shares[0] < 0.01 and shares[1] > 0.9
    assert re.search(says, verdict.lost(recipe, shares[1]))


def test_an_evaluation_that_is_no_number_is_never_the_best():
    assert not decide.is_best(math.nan, None) and not decide.is_best(math.nan, 0.5)
    assert decide.is_best(0.1, math.nan) and decide.is_best(0.1, None) and not decide.is_best(0.1, 0.1)
