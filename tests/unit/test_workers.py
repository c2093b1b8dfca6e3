"""Ghost BatchNorm, keyed dropout, buckets and the optimizer, against plain PyTorch. One rank, real Horovod."""

from contextlib import nullcontext

import pytest
import torch
from conftest import changed
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import models, step
from hpc_lbsgd.train.optim import no_decay_names
from hpc_lbsgd.train.replica import Replica, weights_sha256
from hpc_lbsgd.train.statistics import RunningStatistics
from hpc_lbsgd.train.workers import PassContext, groups_in_step, make_virtual

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine():
    return engines.create(recipes.Machine(), "off", CPU)


@pytest.mark.parametrize("counts, group", [([8], 8), ([8, 8], 4), ([8, 3], 4), ([5], 4)])
def test_batchnorm_is_batchnorm_on_each_group(counts, group):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 6, 5, 5, dtype=torch.float64, requires_grad=True)
    norm = nn.BatchNorm2d(6).double()
    nn.init.uniform_(norm.weight)
    context = PassContext(0, group)
    running = RunningStatistics(make_virtual(norm, context), {}, torch.float64, CPU)
    context.begin(0, list(range(len(counts))), counts)
    sizes = context.sizes
    collected = torch.zeros(running.size, dtype=torch.float64)
    running.begin_pass(len(sizes))
    y = norm(x)
    running.end_forward(collected, len(sizes), len(sizes))
    context.end()
    expected, means, variances = [], [], []
    for part in x.split(sizes):
        if part.shape[0] * 25 > 1:
            expected.append(nn.functional.batch_norm(part, None, None, norm.weight, norm.bias, True, eps=norm.eps))
        means.append(part.mean((0, 2, 3)))
        variances.append(part.var((0, 2, 3), unbiased=True))
    torch.testing.assert_close(y, torch.cat(expected), rtol=0, atol=1e-12)
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    (reference,) = torch.autograd.grad(torch.cat(expected), x, upstream)
    torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)
    assert norm.running_mean.abs().max() == 0
    running.update(collected)
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0), rtol=0, atol=1e-12)
    assert norm.num_batches_tracked == 1


class Recomputes(nn.Module):
    """Forgets its activations and computes them again in backward, or not."""

    def __init__(self, recompute):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.last, self.recompute = nn.Linear(400, 5), recompute

    def forward(self, x):
        x = checkpoint(self.features, x, use_reentrant=False) if self.recompute else self.features(x)
        return self.last(self.norm(x).flatten(1))


def test_statistics_that_backward_computes_again_count_once(engine, monkeypatch):
    found = []
    for recompute in (False, True):
        monkeypatch.setitem(models.MODELS, "odd", lambda section, channels, classes, r=recompute: Recomputes(r))
        base = small_recipe(precision="float64")
        recipe = base.model_copy(update={"model": base.model.model_copy(update={"name": "odd"})})
        replica = Replica(recipe, 5, engine, CPU)
        assert step.Stepper(replica, recipe, batches(recipe, point_of())).run(point_of()).finite
        found.append(weights(replica))
    plain, recomputed = found
    assert plain["features.1.running_var"].sub(0.9).abs().min() > 1e-3  # it moved
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name


def test_groups_in_step_counts_all_ranks_groups():
    point = Point(0, 0, 0, 0.1, 0.9, workers=16, samples_per_worker=8, first=0, count=75)
    assert groups_in_step(point, 4) == 9 * 2 + 1  # nine full workers of two groups, one of three samples
    assert groups_in_step(point, 8) == 10


def test_dropout_does_not_see_the_pass():
    torch.manual_seed(0)
    x = torch.randn(16, 10)
    together, apart = [], []
    for counts, workers, out in (([8, 8], [2, 5], together), ([8], [2], apart), ([8], [5], apart)):
        model = nn.Sequential(nn.Dropout(0.5))
        context = PassContext(1, 8)
        make_virtual(model, context)
        context.begin(3, workers, counts)
        part = x if len(counts) == 2 else x[:8] if workers == [2] else x[8:]
        out.append(model(part))
    assert torch.equal(together[0], torch.cat(apart))
    kept = together[0] != 0
    assert 0.35 < kept.float().mean() < 0.65
    torch.testing.assert_close(together[0][kept], 2 * x[kept])


def small_recipe(**changes):
    base = {"seed": 3, "data": {"channels": 1, "image_size": 12, "augment": "none", "eval_resize": 0, "mean": [0.0],
                                "std": [1.0]},
            "model": {"name": "resnet8", "widths": [16, 16, 16]},
            "batch": {"samples_per_worker": 8, "workers": 4}, "optim": {"weight_decay": 0.01}}  # fmt: skip
    return recipes.validate(changed(base, **changes))


def batches(recipe, point, seed=0):
    """What a loader would yield for one rank: fixed random pictures, a batch a pass."""
    torch.manual_seed(seed)
    dtype = torch.float64 if recipe.precision == "float64" else torch.float32
    x = torch.randn(point.count, 1, 12, 12, dtype=dtype)
    y = torch.randint(0, 5, (point.count,))
    for work in step.Passes(recipe, 0, 1).at(point):
        where = torch.cat([torch.arange(*point.worker_range(j)) for j in work.workers])
        yield x[where], y[where], 0


def point_of(workers=4, count=32, number=0, lr=0.1):
    return Point(number, 0, number, lr, 0.9, workers, 8, 0, count)


def run_steps(engine, recipe, counts=(32, 27, 32)):
    replica = Replica(recipe, 5, engine, CPU)
    outcomes = []
    for i, count in enumerate(counts):
        point = point_of(count=count, number=i)
        outcomes.append(step.Stepper(replica, recipe, batches(recipe, point, i)).run(point))
    return replica, outcomes


def weights(replica):
    return {k: v.double() for k, v in replica.model.state_dict().items()}


@pytest.mark.parametrize("changes", [
    {"machine__reduction": "fusion"}, {"machine__bucket_mb": 0.002, "machine__first_bucket_mb": 0.001},
    {"machine__workers_per_pass": 3}, {"machine__channels_last": False}, {"determinism": "any-ranks"},
])  # fmt: skip
def test_machine_choices_do_not_change_the_result(engine, changes):
    base = {"precision": "float64", "model__dropout": 0.3}
    reference, expected = run_steps(engine, small_recipe(**base))
    found, outcomes = run_steps(engine, small_recipe(**base, **changes))
    tolerance = 1e-9 if "determinism" not in changes else 1e-7
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=0, atol=tolerance)
    for a, b in zip(expected, outcomes, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-8) and a.count == b.count


def test_channels_last_is_left_where_the_library_would_corrupt_memory(engine):
    """A strided 1x1 convolution over 4 channels: 100 steps with odd batches, which crash channels last."""
    narrow = small_recipe(model__widths=[4, 8, 8])
    replica, outcomes = run_steps(engine, narrow, counts=(27,) * 100)
    assert not replica.channels_last and all(o.finite for o in outcomes)
    assert Replica(small_recipe(), 5, engine, CPU).channels_last


@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_any_ranks_does_not_depend_on_the_bucket_layout(engine, kind):
    hashes = set()
    for mb in (0.002, 0.01, 25):
        recipe = small_recipe(determinism="any-ranks", fixed_point=kind, machine__bucket_mb=mb, model__zero_gamma=False)
        replica, outcomes = run_steps(engine, recipe)
        assert all(o.finite for o in outcomes)
        hashes.add(weights_sha256(replica.model))
    assert len(hashes) == 1


def test_fp16_wire_costs_little(engine):
    """One rank: gradients are rounded to 11 bits once; statistics are not."""
    exact, rounded = (run_steps(engine, small_recipe(wire=w))[0] for w in ("fp32", "fp16"))
    a, b = weights(exact), weights(rounded)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=2e-3, atol=2e-3)
    assert not torch.equal(a["fc.weight"], b["fc.weight"])


class NoBatchNorm(nn.Sequential):
    def __init__(self, channels, classes):
        super().__init__(nn.Conv2d(channels, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(150, classes))


def plain_net(channels, classes):
    return NoBatchNorm(channels, classes)


@pytest.mark.parametrize("count", [32, 27])
def test_k_workers_of_n_equal_one_worker_of_kn(engine, count):
    """Without BatchNorm (which makes n part of the objective), tail included: Goyal et al. 2017, eq. 4, Remark 3."""
    results = []
    for workers, n in ((4, 8), (1, 32), (32, 1)):
        recipe = small_recipe(model={"name": "test_workers:plain_net"}, precision="float64",
                              batch={"samples_per_worker": n, "workers": workers})  # fmt: skip
        replica = Replica(recipe, 5, engine, CPU)
        point = Point(0, 0, 0, 0.1, 0.9, workers, n, 0, count)
        step.Stepper(replica, recipe, batches(recipe, point)).run(point)
        results.append(weights(replica))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-12)


def test_sgd_is_torchs_sgd_with_decay_on_weights_only(engine):
    recipe = small_recipe(precision="float64", batch__workers=1, batch__samples_per_worker=32)
    for nesterov, momentum in ((True, 0.9), (False, 0.9), (False, 0.0)):
        optim = recipe.optim.model_copy(update={"nesterov": nesterov, "momentum": momentum})
        replica = Replica(recipe.model_copy(update={"optim": optim}), 5, engine, CPU)
        reference = models.build(recipe.model, 1, 5, recipe.seed, torch.float64)
        skip = no_decay_names(reference)
        assert any("bn" in n for n in skip) and "fc.bias" in skip and "fc.weight" not in skip
        named = list(reference.named_parameters())
        torch_sgd = torch.optim.SGD(
            [{"params": [p for n, p in named if n not in skip], "weight_decay": optim.weight_decay},
             {"params": [p for n, p in named if n in skip], "weight_decay": 0.0}],
            lr=0.1, momentum=momentum, nesterov=nesterov)  # fmt: skip
        reference.train()
        for i in range(4):
            lr = 0.1 / (i + 1)
            point = Point(i, 0, i, lr, momentum, 1, 32, 0, 32)
            ((x, y, _),) = batches(recipe, point, i)
            for group in torch_sgd.param_groups:
                group["lr"] = lr
            torch_sgd.zero_grad()
            nn.functional.cross_entropy(reference(x), y).backward()
            torch_sgd.step()
            step.Stepper(replica, recipe, iter([(x, y, 0)])).run(point)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(replica.model.state_dict()[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("determinism", ["off", "any-ranks"])
def test_a_non_finite_step_changes_nothing(engine, determinism):
    recipe = small_recipe(determinism=determinism)
    replica = Replica(recipe, 5, engine, CPU)
    point = point_of()
    before = weights_sha256(replica.model)
    velocity = [v.clone() for v in replica.optimizer.flats["momentum"]]
    poisoned = [(x.index_fill(0, torch.tensor([0]), float("nan")), y, 0) for x, y, _ in batches(recipe, point)]
    outcome = step.Stepper(replica, recipe, iter(poisoned)).run(point)
    assert not outcome.finite and (outcome.bad_ranks, outcome.bad_rank) == (1, 0)
    assert weights_sha256(replica.model) == before
    assert all(torch.equal(a, b) for a, b in zip(velocity, replica.optimizer.flats["momentum"], strict=True))
    assert step.Stepper(replica, recipe, batches(recipe, point)).run(point).finite


def test_any_ranks_refuses_what_would_wrap(engine):
    recipe = small_recipe(determinism="any-ranks", fixed_point_bits=52)
    replica = Replica(recipe, 5, engine, CPU)
    point = point_of()
    large = [(x * 1e4, y, 0) for x, y, _ in batches(recipe, point)]  # BatchNorm variances of 1e8 * 2^52 > 2^62
    before = weights_sha256(replica.model)
    assert not step.Stepper(replica, recipe, iter(large)).run(point).finite
    assert weights_sha256(replica.model) == before


def test_unused_and_frozen_parameters(engine):
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(144, 5), nn.Linear(144, 5)
            self.frozen = nn.Linear(144, 5)
            self.frozen.requires_grad_(False)
            self.tied = self.used.weight  # the same parameter under a second name

        def forward(self, x):
            x = x.flatten(1)
            return self.used(x) + self.frozen(x) + nn.functional.linear(x, self.tied)

    models.MODELS["partly"] = lambda section, channels, classes: Partly()
    try:
        base = small_recipe(optim__weight_decay=0.0)
        recipe = base.model_copy(update={"model": base.model.model_copy(update={"name": "partly"})})
        replica = Replica(recipe, 5, engine, CPU)
        before = weights(replica)
        point = point_of()
        assert step.Stepper(replica, recipe, batches(recipe, point)).run(point).finite
        after = weights(replica)
        changed_names = {n for n in before if not torch.equal(before[n], after[n])}
        assert changed_names == {"used.weight", "used.bias", "tied"}
        assert torch.equal(after["used.weight"], after["tied"])
    finally:
        del models.MODELS["partly"]


class Twice(nn.Module):
    """Its layer is used twice, each time inside a checkpoint."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(144, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.first(x.flatten(1))
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=self.use_reentrant)
        return self.last(x)


class Clears(nn.Module):
    """Throws its gradients away, as a training loop of its own would."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(144, 5)

    def forward(self, x):
        self.zero_grad()
        return self.layer(x.flatten(1))


@pytest.mark.parametrize(
    "model, says",
    [
        (lambda: Twice(True), "layer.* got a gradient twice in one backward"),
        (Clears, "the gradient of layer.* is not in its bucket"),
        (lambda: Twice(False), None),
    ],
)
def test_gradients_that_would_be_lost_are_refused_by_name(engine, monkeypatch, model, says):
    monkeypatch.setitem(models.MODELS, "odd", lambda section, channels, classes: model())
    base = small_recipe(machine__bucket_mb=1e-6)
    recipe = base.model_copy(update={"model": base.model.model_copy(update={"name": "odd"})})
    replica = Replica(recipe, 5, engine, CPU)
    point = point_of()
    with pytest.raises(RunError, match=says) if says else nullcontext():
        assert step.Stepper(replica, recipe, batches(recipe, point)).run(point).finite


@pytest.mark.parametrize("changes", [{}, {"machine__workers_per_pass": 4}])
def test_decay_inside_the_loss_is_decay_of_the_gradient(engine, changes):
    """Once over all workers, whatever the passes, tail included."""
    a, b = (run_steps(engine, small_recipe(precision="float64", optim__decay_in=where, **changes))[0]
            for where in ("gradient", "loss"))  # fmt: skip
    for name, value in weights(a).items():
        torch.testing.assert_close(weights(b)[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [
    {"precision": "bf16"}, {"optim__name": "adam", "optim__base_lr": 0.01}, {"optim__name": "lars"},
    {"optim__form": "v"},
    {"train__label_smoothing": 0.1}, {"train__ema_decay": 0.9}, {"machine__compile": "stages"},
])  # fmt: skip
def test_every_choice_trains(engine, changes):
    """The loss on one batch falls, and stays the loss it was at the start where only precision differs."""
    recipe = small_recipe(**changes)
    replica = Replica(recipe, 5, engine, CPU)
    losses = []
    for i in range(12):
        point = point_of(number=i, lr=0.05)
        losses.append(step.Stepper(replica, recipe, batches(recipe, point)).run(point, 0.05).loss)
    assert losses[-1] < losses[0] - 0.02, losses
    if "precision" in changes or "machine__compile" in changes:
        plain = run_steps(engine, small_recipe(), counts=(32,))[1][0].loss
        assert losses[0] == pytest.approx(plain, rel=0.02)


def test_optimizers_never_touch_statistics(engine):
    replica = Replica(small_recipe(), 5, engine, CPU)
    first = replica.buckets.buckets[0]
    assert first.layout.statistics > 0
    covered = sum(part.weights.numel() for part in replica.optimizer.parts)
    assert covered == sum(b.layout.size - b.layout.statistics for b in replica.buckets.buckets)
    start = first.weights[first.layout.statistics :].data_ptr()
    end = first.weights.data_ptr() + first.weights.nbytes
    inside = [
        p.weights.data_ptr() for p in replica.optimizer.parts if first.weights.data_ptr() <= p.weights.data_ptr() < end
    ]
    assert inside and min(inside) >= start
