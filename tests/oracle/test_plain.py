"""Is the plain loop itself right? Against numbers written out by hand, and what the papers say must be equal."""

import models
import numpy as np
import plain
import pytest
import torch
from conftest import changed
from small_sets import Pictures, one_short, whole
from test_oracle import RECIPE
from torch import nn

from hpc_lbsgd.data.order import Permutation

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(recipe, data, model=models.Plain, steps=50):
    torch.manual_seed(1)
    model = model(3, 3) if isinstance(model, type) else model
    return plain.train(changed(recipe, train__max_steps=steps), model, data)[0]


@pytest.mark.parametrize("nesterov", [True, False])
def test_softmax_regression_in_numpy_with_tails(nesterov):
    """u <- m * u + g with g = sum / kn, in a tail of 3 of 20 too; decay on weights in full, on biases not."""
    recipe = changed(RECIPE, optim__nesterov=nesterov, schedule__warmup_epochs=0, schedule__milestones=[])
    data = Pictures(23)
    x = np.stack([p.numpy().astype(float).ravel() for p, _ in data])
    x, truth = np.hstack([x, np.ones((23, 1))]), np.eye(3)[data.labels]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    w = np.hstack([model[1].weight.detach().double(), model[1].bias.detach().double()[:, None]])
    u, decays = np.zeros_like(w), np.arange(109) < 108
    for step in range(7):
        order = Permutation(23, 5, step // 2)[slice(0, 20) if step % 2 == 0 else slice(20, 23)]
        p = np.exp(x[order] @ w.T)
        g = (p / p.sum(1, keepdims=True) - truth[order]).T @ x[order] / 20 + 0.01 * w * decays
        u = 0.9 * u + g
        w = w - 0.1 * (g + 0.9 * u if nesterov else u)
    end = trained(recipe, data, model, steps=7)
    np.testing.assert_allclose(np.hstack([end["1.weight"], end["1.bias"][:, None]]), w, rtol=0, atol=1e-13)


def test_statistics_of_a_layer_used_twice():
    """The second call sees what the first normalised; each call moves the average once a step, by the groups' mean.
    In a tail of 9 of 20, whose last group has one value a channel, the momentum is 1 - 0.9 ** (9 / 20)."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(108, affine=False), nn.Linear(108, 3)

        def forward(self, x):
            return self.last(self.norm(2 * self.norm(x.flatten(1))))

    data = Pictures(29)
    x, mean, variance = np.stack([p.numpy().astype(float).ravel() for p, _ in data]), 0.0, 1.0
    order = Permutation(29, 5, 0)
    for full, starts in ((1, range(0, 20, 4)), (9 / 20, (20, 24))):
        groups = [x[order[start : start + 4]] for start in starts]
        momentum = 1 - 0.9**full
        for _ in range(2):
            mean = (1 - momentum) * mean + momentum * np.mean([g.mean(0) for g in groups], axis=0)
            variance = (1 - momentum) * variance + momentum * np.mean([g.var(0, ddof=1) for g in groups], axis=0)
            groups = [2 * (g - g.mean(0)) / np.sqrt(g.var(0) + 1e-5) for g in groups]
    end = trained(RECIPE, data, Two(), steps=2)
    np.testing.assert_allclose(end["norm.running_mean"], mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(end["norm.running_var"], variance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_corrected_v_form_is_u_form(nesterov):
    """Goyal et al. 2017, Remark 2: through warm-up, a milestone and tails."""
    recipe = changed(RECIPE, optim__nesterov=nesterov)
    u, v = (trained(changed(recipe, optim__form=form), one_short("train")) for form in "uv")
    assert all(torch.allclose(u[name], v[name], rtol=0, atol=1e-12) for name in u)
    wrong = trained(changed(recipe, optim__form="v", optim__momentum_correction=False), one_short("train"))
    assert not torch.allclose(u["conv1.weight"], wrong["conv1.weight"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_decay_in_the_loss_is_decay_of_the_gradient(name):
    recipe = changed(RECIPE, optim__name=name, optim__base_lr=0.01, schedule__warmup_start_lr=0.01)
    a, b = (trained(changed(recipe, optim__decay_in=where), one_short("train")) for where in ("gradient", "loss"))
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-12) for name in a)


@pytest.mark.parametrize("samples", [20, 5])
def test_a_lars_step_is_as_long_as_its_samples(samples):
    """Without decay a step moves a weight by lr * trust * |w|, whatever its gradient; a tail by B'/kn of that."""
    recipe = changed(RECIPE, optim__name="lars", optim__weight_decay=0.0, schedule__warmup_epochs=0)
    torch.manual_seed(1)
    start, end = models.Plain(3, 3).double().fc.weight, trained(recipe, Pictures(samples), steps=1)["fc.weight"]
    length = 0.1 * 0.02 * start.norm().item() * samples / 20
    assert (end - start).norm().item() == pytest.approx(length, rel=1e-9)


def test_a_worker_alone_measures_in_its_branch():
    """No worker goes there: statistics stay. Some do: they are not what all would measure."""
    never, some = (trained(RECIPE, whole("train"), m) for m in (models.NeverTaken, models.Branch))
    torch.manual_seed(1)
    start = models.NeverTaken(3, 3).double().extra_norm
    assert torch.equal(never["extra_norm.running_var"], start.running_var)
    assert not torch.equal(some["extra_norm.running_var"], start.running_var)
