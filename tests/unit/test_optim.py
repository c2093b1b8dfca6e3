"""Optimizers against their papers' equations and against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import optim

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    """Two matrices and a vector without weight decay."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.c = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))


def run(section, rates, momentum=0.9, net=None, momenta=None):
    """Weights after a step of fixed pseudo-random gradients at each learning rate."""
    net = net or Net()
    layouts = plan_layouts(list(net.named_parameters()), optim.no_decay_names(net), 0, 100, 100)
    buckets = Buckets(layouts, None, CPU, torch.float64)
    optimizer = optim.create(buckets, section)
    for i, lr in enumerate(rates):
        for parameter, gradient in zip(net.parameters(), gradients(i), strict=True):
            parameter.grad.copy_(gradient + 0.1 * parameter.detach())  # depends on the weights: differences feed back
        m = momenta[i] if momenta else momentum
        optimizer.step(Point(i, 0, i, lr, m, 1, 1, 0, 1), rates[i - 1] if i else 0.0)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients(step):
    torch.manual_seed(1000 + step)
    return [
        torch.randn(6, 5, dtype=torch.float64),
        torch.randn(5, dtype=torch.float64),
        torch.randn(4, 3, dtype=torch.float64),
    ]


def section(**changes):
    return recipes.Optim(**{"weight_decay": 0.02, **changes})


rates = st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=12)


@settings(max_examples=60)
@given(rates=rates, nesterov=st.booleans())
def test_v_form_with_correction_is_the_u_form(rates, nesterov):
    """Goyal et al. 2017, Remark 2, under any positive learning rates, plain and Nesterov."""
    u = run(section(form="u", nesterov=nesterov), rates)
    v = run(section(form="v", nesterov=nesterov), rates)
    torch.testing.assert_close(v, u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nesterov", [True, False])
def test_without_the_correction_it_is_not(nesterov):
    rising = [0.01, 0.02, 0.04, 0.4, 0.4]
    u = run(section(form="u", nesterov=nesterov), rising)
    v = run(section(form="v", nesterov=nesterov, momentum_correction=False), rising)
    assert (u - v).abs().max() > 0.05
    constant = [0.05] * 5
    same = run(section(form="v", nesterov=nesterov, momentum_correction=False), constant)
    torch.testing.assert_close(same, run(section(form="u", nesterov=nesterov), constant), rtol=0, atol=1e-12)


def test_momentum_may_change_on_the_way():
    momenta, rates = [0.9, 0.9, 0.95, 0.98], [0.1, 0.1, 0.05, 0.05]
    u, v = (run(section(form=f, nesterov=False), rates, momenta=momenta) for f in "uv")
    torch.testing.assert_close(u, v, rtol=0, atol=1e-12)


def test_adam_is_torchs():
    rates = [0.01, 0.02, 0.005, 0.01, 0.03]
    net = Net()
    groups = [{"params": [net.a, net.c], "weight_decay": 0.02}, {"params": [net.b], "weight_decay": 0.0}]
    adam = torch.optim.Adam(groups, lr=0.1, betas=(0.9, 0.99), eps=1e-6)
    for i, lr in enumerate(rates):
        for group in adam.param_groups:
            group["lr"] = lr
        for parameter, gradient in zip(net.parameters(), gradients(i), strict=True):
            parameter.grad = gradient + 0.1 * parameter.detach()
        adam.step()
    expected = torch.cat([p.detach().flatten() for p in net.parameters()])
    found = run(section(name="adam", beta2=0.99, epsilon=1e-6), rates)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_lars_by_its_equation():
    rates, m, trust, decay = [0.5, 1.0, 0.8], 0.9, 0.02, 0.01
    net = Net()
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for i, lr in enumerate(rates):
        for j, (p, raw) in enumerate(zip(net.parameters(), gradients(i), strict=True)):
            w = p.detach()
            g = raw + 0.1 * w
            if p.dim() > 1:
                ratio = trust * w.norm() / (g.norm() + decay * w.norm())
                g = ratio * (g + decay * w)
            velocity[j] = m * velocity[j] + lr * g
            p.data = w - velocity[j]
    expected = torch.cat([p.detach().flatten() for p in net.parameters()])
    found = run(section(name="lars", trust=trust, weight_decay=decay), rates)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_lars_takes_a_layer_of_zeros():
    net = Net()
    net.a.data.zero_()
    assert torch.isfinite(run(section(name="lars"), [0.1, 0.1], net=net)).all()


def test_scaling_the_loss_is_not_scaling_the_learning_rate():
    """Goyal et al. 2017, Remark 1. k times the cross-entropy decays by lr, k times the learning rate by k*lr: after one
    step the weights that decay are apart by (k-1)*lr*decay*w, the others not at all."""
    k, lr, decay = 8, 0.05, 0.1
    plain = section(weight_decay=decay, nesterov=False)
    start = Net()
    scaled_rate = run(plain, [k * lr], net=Net())
    net = Net()
    layouts = plan_layouts(list(net.named_parameters()), optim.no_decay_names(net), 0, 100, 100)
    optimizer = optim.create(Buckets(layouts, None, CPU, torch.float64), plain)
    for parameter, gradient in zip(net.parameters(), gradients(0), strict=True):
        parameter.grad.copy_(k * (gradient + 0.1 * parameter.detach()))
    optimizer.step(Point(0, 0, 0, lr, 0.9, 1, 1, 0, 1), 0.0)
    scaled_loss = torch.cat([p.detach().flatten() for p in net.parameters()])
    apart = [(k - 1) * lr * decay * p.detach().flatten() * (p.dim() > 1) for p in start.parameters()]
    torch.testing.assert_close(scaled_loss - scaled_rate, torch.cat(apart))
    assert torch.cat(apart).abs().max() > 0.05


def test_average_of_weights():
    net = Net()
    layouts = plan_layouts(list(net.named_parameters()), set(), 0, 1e6, 1e6)
    buckets = Buckets(layouts, None, CPU, torch.float64)
    average = optim.Average([b.weights for b in buckets.buckets], 0.9)
    start = net.a.detach().clone()
    net.a.data += 1
    average.update()
    average.swap()
    torch.testing.assert_close(net.a.detach(), start + 0.1)
    average.swap()
    torch.testing.assert_close(net.a.detach(), start + 1)
