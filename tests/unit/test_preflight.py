"""Preflight: what it refuses, by name, and that it sees what it is for. What passes is in tests/oracle/test_zoo.py."""

import pytest
import torch
from authors import checks_of
from test_layers import NormRelu
from test_workers import CPU, engine, small_recipe  # noqa: F401
from torch import nn
from torch.nn.utils import parametrizations

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import models, preflight, probe, workers
from hpc_lbsgd.train.losses import loss_function
from hpc_lbsgd.train.replica import Replica

pytestmark = pytest.mark.usefixtures("one_thread")


class Remembers(nn.Module):
    """Keeps what it saw last, in evaluation alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        if not self.training:
            self.last.copy_(x.mean())
        return x


class Codebook(nn.Module):
    """Its table follows what it sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(3), persistent=False)

    def forward(self, x):
        if self.training:
            self.table.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x - self.table.view(1, -1, 1, 1)


def with_layer(layer):
    return nn.Sequential(nn.Conv2d(3, 3, 3), layer, nn.Flatten(), nn.Linear(300, 10))


REFUSED = {
    "spectral_norm, as a parametrization": (
        lambda: with_layer(parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))),
        r"1\.parametrizations\.weight\.0\._u of .*\(_SpectralNorm\) is changed by each forward",
    ),
    "spectral_norm, the older way": (
        lambda: with_layer(nn.utils.spectral_norm(nn.Conv2d(3, 3, 1))),
        r"1\.weight_u of 1 \(Conv2d\) is changed by each forward",
    ),
    "a buffer written in evaluation": (lambda: with_layer(Remembers()), r"1\.last of 1 \(Remembers\) is changed"),
    "a buffer written in forward": (lambda: with_layer(Codebook()), r"1\.table of 1 \(Codebook\) is changed"),
}


@pytest.mark.parametrize("make, says", REFUSED.values(), ids=REFUSED)
def test_state_that_nobody_accounts_for_is_refused(make, says):
    torch.manual_seed(5)  # a small matrix may have its norm to the last bit, and then nothing changes
    seen_model = make()
    call = probe.Call(torch.randn(4, 3, 12, 12), torch.zeros(4, dtype=torch.int64), loss_function(recipes.Train()),
                      lambda m, x: m(x), 7)  # fmt: skip
    seen = probe.look(seen_model, call)
    with pytest.raises(RequestError, match=says):
        probe.refuse_state(seen_model, seen.changed + probe.changed_by_evaluation(seen_model, call))


# ---------------------------------------------------------------- it sees what it is for


def norm_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), NormRelu(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Flatten(), nn.Linear(256, 10))  # fmt: skip


def lose_activation(self, x, group, mean, variance, training, more, named):
    return nn.functional.batch_norm(x, mean, variance, self.module.weight, self.module.bias, training, 1.0)


def lose_statistics(self, sums, share=1.0):
    pass


def test_it_names_the_first_module_that_we_changed(monkeypatch):
    assert checks_of(norm_net)[0] == {"model": None, "masks": None}
    with monkeypatch.context() as changed_here:
        changed_here.setattr(workers.VirtualNorm, "_run_own", lose_activation)
        assert "the first module that differs: 1" in checks_of(norm_net)[0]["model"]
    with monkeypatch.context() as changed_here:
        changed_here.setattr("hpc_lbsgd.train.statistics.RunningStatistics.update", lose_statistics)
        assert "buffer" in checks_of(norm_net)[0]["model"]


def test_it_sees_wrong_masks(monkeypatch):
    net = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(400, 10))  # noqa: E731
    assert checks_of(net)[0]["masks"] is None
    monkeypatch.setattr(workers, "stream_key", lambda *parts: 5)
    assert checks_of(net)[0]["masks"] == "1 draws one mask for two calls or workers"


class OwnGenerator(nn.Module):
    """Noise that no seed of ours reaches."""

    def __init__(self):
        super().__init__()
        self.net, self.generator = nn.Linear(144, 5), torch.Generator().manual_seed(3)

    def forward(self, x):
        return self.net(x.flatten(1) + torch.randn(144, generator=self.generator))


@pytest.mark.parametrize("determinism", ["off", "any-ranks"])
def test_a_model_that_draws_by_itself_is_refused(engine, monkeypatch, determinism):  # noqa: F811
    monkeypatch.setitem(models.MODELS, "own", lambda section, channels, classes: OwnGenerator())
    base = small_recipe(determinism=determinism)
    recipe = base.model_copy(update={"model": base.model.model_copy(update={"name": "own"})})
    found = checks_on_replica(engine, recipe)
    assert "a model that draws by itself?" in found["workers"]
    assert checks_on_replica(engine, base)["workers"] is None


def checks_on_replica(engine, recipe, begun=None):  # noqa: F811
    replica = Replica(recipe, 5, engine, CPU)
    torch.manual_seed(0)
    batches = {j: (torch.randn(8, 1, 12, 12), torch.randint(0, 5, (8,)), 0) for j in (0, 1)}
    point = Point(0, 0, 0, 0.1, 0.9, 4, 8, 0, 32)
    found, facts = preflight.after(replica, recipe, point, batches, begun)
    checks_on_replica.facts = facts
    assert not any(place.any() for _, place in replica.buckets.places)
    return {c.check: None if c.ok else c.what for c in found}


def test_other_hardware_at_a_resume_is_named(engine):  # noqa: F811
    recipe = small_recipe(determinism="any-ranks")
    assert checks_on_replica(engine, recipe) == {"workers": None, "ranks": None}
    facts = dict(checks_on_replica.facts)
    assert checks_on_replica(engine, recipe, facts)["ranks"] is None
    other = facts | {"gradient": "0" * 64, "cpu": "Another CPU, AVX512"}
    assert "begun on cpu (Another CPU, AVX512" in checks_on_replica(engine, recipe, other)["ranks"]


def test_ranks_that_differ_are_named():
    same = {"host": "a", "weights": "w", "threads": 1, "torch": "2", "batch": "b", "gradient": "g", "cpu": "c",
            "device": "cpu"}  # fmt: skip
    assert preflight.check_ranks([same] * 4, None).ok
    for key, value, says in (
        ("threads", 2, "another number of threads"),
        ("batch", "x", "decodes worker 0's samples"),
        ("gradient", "x", "computes another gradient"),
        ("weights", "x", "torch's generator"),
    ):
        check = preflight.check_ranks([same, same, same | {key: value, "host": "bad"}, same], None)
        assert not check.ok and "rank 2 on bad" in check.what and says in check.what


def lazy(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def test_a_lazy_layer_is_refused_by_name():
    recipe = small_recipe(model={"name": "test_preflight:lazy"})
    batch = (torch.randn(4, 1, 12, 12), torch.zeros(4, dtype=torch.int64), 0)
    with pytest.raises(RequestError, match=r"model: 1 \(LazyLinear\) has no weights before its first forward"):
        preflight.before(recipe, 5, {0: batch}, CPU, torch.channels_last, False)


def test_shared_draws_are_refused_for_several_workers_a_pass():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    recipe = small_recipe(machine__workers_per_pass=2)
    batch = (torch.randn(4, 3, 12, 12), torch.zeros(4, dtype=torch.int64), 0)
    models.MODELS["noisy"] = lambda section, channels, classes: Noisy(nn.Flatten(), nn.Linear(432, 10))
    try:
        named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "noisy"})})
        found = preflight.before(named, 10, {0: batch}, CPU, torch.contiguous_format, True)
    finally:
        del models.MODELS["noisy"]
    assert any(not c.ok and "workers_per_pass = 2 would let workers share" in c.what for c in found.checks)


def build_and_call(make, samples=8):
    def build():
        torch.manual_seed(0)
        return make()

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(samples, 3, 8, 8, generator=generator), torch.randint(0, 10, (samples,), generator=generator)
    return build, probe.Call(x, y, loss_function(recipes.Train()), lambda m, i: m(i), 7)


class OwnNorm(nn.Module):
    """Normalises over the samples that it gets, and is no BatchNorm."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.std(0) + 1)


class TimeFirst(nn.Module):
    """A BatchNorm that sees time where samples are expected."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(24)

    def forward(self, x):
        x = x.flatten(1, 2).permute(2, 0, 1)  # (8 times, samples, 24)
        return torch.stack([self.norm(x[:, i]) for i in range(x.shape[1])]).flatten(1)


@pytest.mark.parametrize("middle, features, holds", [
    (nn.BatchNorm2d(3), 192, True), (OwnNorm(), 192, False), (TimeFirst(), 192, False),
])  # fmt: skip
def test_groups_that_meet_in_a_pass_are_refused(middle, features, holds):
    import copy

    make = lambda: nn.Sequential(copy.deepcopy(middle), nn.Flatten(), nn.Linear(features, 10))  # noqa: E731
    build, call = build_and_call(make, 16)
    recipe = small_recipe(batch__bn_group=4)
    seen = probe.look(build(), call)
    check = preflight.compare_groups(recipe, build, call, seen, torch.float32, CPU)
    assert check.ok == holds, check


def test_dropouts_that_are_not_ours_may_not_be_shared():
    """AlphaDropout draws from torch's generator: several workers a pass would share its mask."""
    recipe = small_recipe(machine__workers_per_pass=2)
    batch = (torch.randn(4, 3, 12, 12), torch.zeros(4, dtype=torch.int64), 0)
    make = lambda section, channels, classes: nn.Sequential(nn.Flatten(), nn.AlphaDropout(0.3), nn.Linear(432, 10))  # noqa: E731
    models.MODELS["alpha"] = make
    try:
        named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": "alpha"})})
        found = preflight.before(named, 10, {0: batch}, CPU, torch.contiguous_format, True)
    finally:
        del models.MODELS["alpha"]
    assert any(not c.ok and "would let workers share" in c.what for c in found.checks)


def test_data_that_draws_by_itself_is_refused(engine):  # noqa: F811
    x, y = torch.randn(4, 3), torch.zeros(4)
    assert preflight.check_data((x, y, 0), (x.clone(), y.clone(), 0), engine).ok
    wrong = preflight.check_data((x, y, 0), (x + 1e-6, y, 0), engine)
    assert not wrong.ok and "sample(index, rng)" in wrong.what
