"""McCandlish et al. 2018: the estimator, its interval, the frontier."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_workers import CPU, batches, engine, point_of, small_recipe  # noqa: F401 - engine is a fixture

from hpc_lbsgd.theory.noise import Measurement, adaptive_batch, measure, noise_scale, student95, transferred_lr
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.theory.tradeoff import Tradeoff, fit, fit_interval
from hpc_lbsgd.train import step
from hpc_lbsgd.train.replica import Replica


def test_recovers_exact_expectations():
    """|G|^2 = 4, tr(Sigma) = 1000, from E|g_B|^2 = |G|^2 + tr(Sigma)/B at B = 32 and 256."""
    found = measure(4 + 1000 / 32, 4 + 1000 / 256, 32, 256)
    assert found == pytest.approx((1000, 4))


@given(square=st.floats(0.01, 100), trace=st.floats(0.01, 1e5), small=st.integers(1, 64), workers=st.integers(2, 500))
def test_recovers_any_expectations(square, trace, small, workers):
    big = small * workers
    found = measure(square + trace / small, square + trace / big, small, big)
    assert found.trace == pytest.approx(trace, rel=1e-6) and found.square == pytest.approx(
        square, rel=1e-6, abs=1e-6 * trace
    )


def test_is_the_sample_variance_over_workers():
    """tr(Sigma) = n/(k-1) * sum |g_j - mean|^2 and |G|^2 = |mean|^2 - tr(Sigma)/(kn): PAPERS' oracle."""
    rng = np.random.default_rng(0)
    n, k = 8, 5
    g = rng.normal(1, 2, (k, 40))
    found = measure((g**2).sum(1).mean(), (g.mean(0) ** 2).sum(), n, k * n)
    trace = n / (k - 1) * ((g - g.mean(0)) ** 2).sum()
    assert found == pytest.approx((trace, (g.mean(0) ** 2).sum() - trace / (k * n)))


def test_synthetic_gradients_average_to_the_truth():
    rng = np.random.default_rng(1)
    dimensions, n, k = 500, 16, 16
    mean = np.full(dimensions, 2 / np.sqrt(dimensions))
    found = []
    for _ in range(60):
        g = mean + rng.normal(0, np.sqrt(1000 / dimensions / n), (k, dimensions))
        found.append(measure((g**2).sum(1).mean(), (g.mean(0) ** 2).sum(), n, k * n))
    estimate = noise_scale(found)
    assert estimate.low < 250 < estimate.high
    assert estimate.value == pytest.approx(250, rel=0.15)


def test_ratio_of_averages_and_its_interval():
    """Coverage of the 95 % interval over 800 noisy series, bounded or not."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(800):
        series = [Measurement(t, s) for t, s in zip(rng.normal(1000, 300, 12), rng.normal(4, 3, 12), strict=True)]
        found = noise_scale(series)
        covered += found.low <= 250 and (found.high is None or found.high >= 250)
    assert 0.91 < covered / 800 < 0.98


def test_a_gradient_lost_in_noise_is_bounded_below_only():
    found = noise_scale([Measurement(1000, s) for s in (-3, 2, -1, 1, 0.5)])
    assert found.high is None and found.value is None and found.low > 0
    assert noise_scale([Measurement(1, 1)]) is None


def test_students_quantiles():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}
    assert all(student95(n) == pytest.approx(t, rel=0.01) for n, t in table.items())


def test_learning_rate_for_another_batch():
    """PAPERS: 256 -> 8192 gives x25.4 at B_noise = 30k and x21.1 at 15k; x32 in the limit of much noise."""
    assert transferred_lr(1, 256, 8192, 30_000) == pytest.approx(25.4, abs=0.05)
    assert transferred_lr(1, 256, 8192, 15_000) == pytest.approx(21.1, abs=0.05)
    assert transferred_lr(1, 256, 8192, 1e12) == pytest.approx(32)
    assert adaptive_batch(400, 1) == 20


def test_frontier():
    """B_crit = 1000: 5x the steps and 1.25x the examples at 250, the reverse at 4000, twice both at 1000."""
    frontier = Tradeoff(100, 100_000)
    assert frontier.critical_batch == 1000
    for batch, steps, examples in ((250, 5, 1.25), (4000, 1.25, 5), (1000, 2, 2)):
        assert frontier.steps(batch) == pytest.approx(100 * steps)
        assert frontier.examples(batch) == pytest.approx(100_000 * examples)
        assert (frontier.steps(batch) / 100 - 1) * (frontier.examples(batch) / 100_000 - 1) == pytest.approx(1)


def test_fit_finds_the_frontier():
    truth = Tradeoff(150, 60_000)
    sizes = [32, 64, 128, 256, 512, 1024, 2048]
    assert fit(sizes, [truth.steps(b) for b in sizes]) == pytest.approx(truth)
    rng = np.random.default_rng(0)
    many = sizes * 3
    noisy = [truth.steps(b) * np.exp(rng.normal(0, 0.1)) for b in many]
    found = fit(many, noisy)
    low, high = fit_interval(many, noisy)
    assert low < truth.critical_batch < high
    assert found.critical_batch == pytest.approx(400, rel=0.4)
    with pytest.raises(ValueError, match="two batches"):
        fit([64, 64], [10, 11])
    with pytest.raises(ValueError, match="no frontier"):
        fit([32, 1024], [10, 400])


@pytest.mark.parametrize("changes", [{}, {"machine__workers_per_pass": 4}, {"determinism": "any-ranks"},
                                     {"machine__reduction": "fusion"}])  # fmt: skip
def test_a_measured_step_is_a_step(engine, changes):  # noqa: F811
    """Measuring changes no weight, whatever the passes, and sees each worker's own gradient."""
    plain, measured = (small_recipe(precision="float64", train__noise_scale_steps=n, **changes) for n in (0, 1))
    replicas = [Replica(r, 5, engine, CPU) for r in (plain, measured)]
    for i, count in enumerate((32, 32, 27)):
        point = point_of(count=count, number=i)
        points = point, replace(point, measured=count == 32)
        outcomes = [step.Stepper(rep, rec, batches(rec, p, i)).run(p)
                    for rep, rec, p in zip(replicas, (plain, measured), points, strict=True)]  # fmt: skip
        assert outcomes[0].measurement is None
        assert (outcomes[1].measurement is None) == (count != 32)
    for a, b in zip(*(r.model.state_dict().values() for r in replicas), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_agrees_with_brute_force_at_frozen_weights(engine):  # noqa: F811
    """tr(Sigma)/|G|^2 from 100 measured steps of frozen weights, against all samples' gradients one by one."""
    recipe = small_recipe(model={"name": "test_workers:plain_net"}, precision="float64", train__noise_scale_steps=1,
                          batch__workers=8, batch__samples_per_worker=4)  # fmt: skip
    replica = Replica(recipe, 5, engine, CPU)
    torch.manual_seed(3)
    x, y = torch.randn(600, 1, 12, 12, dtype=torch.float64), torch.randint(0, 5, (600,))
    x += y.view(-1, 1, 1, 1) * 0.3
    gradients = []
    for i in range(600):
        loss = torch.nn.functional.cross_entropy(replica.model(x[i : i + 1]), y[i : i + 1])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(replica.model.parameters()))]))
    gradients = torch.stack(gradients)
    mean = gradients.mean(0)
    truth = ((gradients - mean) ** 2).sum(1).mean().item() / mean.square().sum().item()
    measured = []
    for i in range(100):
        chosen = torch.randint(0, 600, (32,))
        point = Point(i, 0, i, 1e-300, 0.9, 8, 4, 0, 32, measured=True)
        parts = iter([(x[chosen[j : j + 4]], y[chosen[j : j + 4]], 0) for j in range(0, 32, 4)])
        measured.append(step.Stepper(replica, recipe, parts).run(point).measurement)
    found = noise_scale(measured)
    assert found.low < truth < found.high
    assert found.high / found.low < 2


def test_an_adaptive_batch_never_outgrows_dropped_tails():
    """last_batch: drop with schedule.max_batch above N: a batch larger than the data would leave no step."""
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.train.decide import batch_from

    def decided(last_batch):
        recipe = recipes.validate(
            {
                "batch": {"samples_per_worker": 8, "workers": 2, "last_batch": last_batch},
                "schedule": {"kind": "adaptive-batch", "max_batch": 800, "warmup": "none"},
                "train": {"noise_scale_steps": 1, "epochs": 4},
            }
        )
        measured = noise_scale([Measurement(1e6, 1.0)] * 3)
        decision = batch_from(recipe, recipe.build_schedule(100), 1, measured)
        recipe.build_schedule(100, [decision])
        return decision.workers

    assert decided("drop") == 12 and decided("partial") == 100
