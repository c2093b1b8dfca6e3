"""What users' layers do while workers are virtual, against plain PyTorch: their own forward, own calls, own masks."""

import pytest
import torch
import torch.nn.functional as F
from test_workers import CPU
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.train import compiling
from hpc_lbsgd.train.statistics import RunningStatistics
from hpc_lbsgd.train.workers import PassContext, make_virtual


class Virtual:
    """A model with virtual layers, in passes of one process: what `Replica` does, without an engine."""

    def __init__(self, model, bn_group=8, calls=None, seed=1):
        self.model, self.context = model.train(), PassContext(seed, bn_group)
        layers = make_virtual(model, self.context)
        self.running = RunningStatistics(layers, calls or {}, next(model.parameters()).dtype, CPU)

    def step(self, passes, step=0, share=1.0, groups=None):
        """passes: [(workers, counts, input)]. Returns the outputs; gradients add up in the parameters."""
        sums, outputs = torch.zeros(self.running.size, dtype=self.running.flat.dtype), []
        for workers, counts, x in passes:
            self.context.begin(step, workers, counts)
            self.running.begin_pass(len(self.context.groups))
            y = self.model(x)
            self.running.end_forward(sums, len(self.context.groups), groups or len(self.context.groups))
            if y.requires_grad:
                y.square().sum().backward()
            self.context.end()
            outputs.append(y.detach())
        self.running.update(sums, share)
        return outputs


class NormRelu(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the activation is in the layer, and so is a dropout."""

    def __init__(self, features):
        super().__init__(features)
        self.drop, self.act = nn.Dropout(0.0), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def twin(make):
    """Two models of one start."""
    torch.manual_seed(0)
    first = make().double()
    torch.manual_seed(0)
    return first, make().double()


def images(count, channels=3, size=6, seed=5):
    return torch.randn(count, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("counts, group", [([8], 8), ([8], 4), ([8, 5], 4)])
def test_a_subclass_keeps_its_own_forward(counts, group):
    plain, ours = twin(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormRelu(4), nn.Conv2d(4, 2, 3)))
    virtual, x = Virtual(ours, group), images(sum(counts))
    (y,) = virtual.step([(list(range(len(counts))), counts, x)])
    assert type(ours[1]) is NormRelu
    plain.train()
    means, expected = [], []
    for part in x.split([s for c in counts for s in [group] * (c // group) + [c % group] * (c % group > 0)]):
        plain[1].reset_running_stats()
        expected.append(plain(part))
        expected[-1].square().sum().backward()
        means.append(plain[1].running_mean.clone())
    torch.testing.assert_close(y, torch.cat(expected).detach(), rtol=0, atol=1e-12)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(ours[1].running_mean, torch.stack(means).mean(0), rtol=0, atol=1e-12)
    assert ours[1].num_batches_tracked == 1 and ours[1].momentum == 0.1


def test_a_frozen_layer_keeps_its_statistics_and_uses_them():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    plain, ours = twin(lambda: Frozen(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    for model in (plain, ours):
        model[1].running_var.fill_(2.0)
    virtual, x = Virtual(ours), images(8)
    for number in range(25):
        (y,) = virtual.step([([0], [8], x)], number)
    torch.testing.assert_close(y, plain.train()(x).detach(), rtol=0, atol=1e-12)
    assert torch.equal(ours[1].running_var, torch.full((4,), 2.0, dtype=torch.float64))
    assert ours[1].num_batches_tracked == 0


class Branch(nn.Module):
    """One of two layers, as the pictures say."""

    def __init__(self):
        super().__init__()
        self.dark, self.bright, self.never = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bright(x) if x.mean() > 0 else self.dark(x)


def test_statistics_are_the_mean_over_the_groups_that_measured():
    ours = Branch().double()
    virtual, x = Virtual(ours), images(8)
    bright, brighter, dark = x + 1, x * 2 + 3, x - 1
    virtual.step([([0], [8], bright), ([1], [8], dark), ([2], [8], brighter)], groups=3)
    want = 0.1 * torch.stack([bright.mean((0, 2, 3)), brighter.mean((0, 2, 3))]).mean(0)
    torch.testing.assert_close(ours.bright.running_mean, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.dark.running_mean, 0.1 * dark.mean((0, 2, 3)), rtol=0, atol=1e-12)
    assert ours.never.running_var.eq(1).all() and ours.never.num_batches_tracked == 0
    kept = ours.dark.running_mean.clone()
    virtual.step([([0], [8], bright)], 1)
    assert torch.equal(ours.dark.running_mean, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(7, 5, 9, 3), (1, 3, 5, 5), (5, 1, 6, 6), (33, 17, 4, 1), (32, 16, 1, 1)])
def test_a_groups_bits_do_not_depend_on_who_else_is_in_the_pass(shape, layout, dtype):
    """Outputs, gradients of inputs and running statistics of 4 workers in 1, 2 and 4 passes."""
    n, channels = shape[:2]
    whole = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    x = torch.randn(4 * n, *shape[1:], dtype=whole).to(dtype).contiguous(memory_format=layout)
    upstream, found = torch.randn_like(x), []
    for passes in ([[0, 1, 2, 3]], [[0, 1, 2], [3]], [[0], [1], [2], [3]]):
        torch.manual_seed(1)
        virtual = Virtual(nn.BatchNorm2d(channels).to(whole), n)
        nn.init.normal_(virtual.model.weight)
        sums, parts = torch.zeros(virtual.running.size, dtype=whole), []
        for workers in passes:
            rows = slice(workers[0] * n, (workers[-1] + 1) * n)
            part = x[rows].clone().requires_grad_()
            virtual.context.begin(0, workers, [n] * len(workers))
            virtual.running.begin_pass(len(workers))
            y = virtual.model(part)
            virtual.running.end_forward(sums, len(workers), 4)
            y.backward(upstream[rows])
            parts.append((y.detach(), part.grad))
        virtual.running.update(sums)
        found.append([*map(torch.cat, zip(*parts, strict=True)), virtual.running.flat])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


class Twice(nn.Module):
    """One BatchNorm and one dropout, each used twice in a forward."""

    def __init__(self, recompute=False, p=0.0):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(p)
        self.recompute = recompute

    def part(self, x):
        return self.drop(F.relu(self.norm(self.conv(x))))

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.part, x, use_reentrant=False) if self.recompute else self.part(x)
        return x


def test_each_call_of_a_layer_has_its_own_statistics():
    plain, ours = twin(Twice)
    virtual = Virtual(ours, calls={"norm": 2})
    plain.train()
    for number in range(3):
        x = images(8, seed=number)
        (y,) = virtual.step([([0], [8], x)], number)
        torch.testing.assert_close(y, plain(x).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.norm.running_mean, plain.norm.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.norm.running_var, plain.norm.running_var, rtol=0, atol=1e-12)
    assert ours.norm.num_batches_tracked == plain.norm.num_batches_tracked == 6
    with pytest.raises(RunError, match=r"norm \(BatchNorm2d\) is called 2 times in a forward"):
        Virtual(Twice().double()).step([([0], [8], images(8))])


def test_one_value_a_channel_normalises_to_zero_and_says_nothing():
    ours = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    nn.init.constant_(ours[1].bias, 0.25)
    virtual = Virtual(ours, 4)
    x = torch.randn(5, 5, dtype=torch.float64)
    (y,) = virtual.step([([0, 1], [4, 1], x)])
    assert torch.equal(y[4], torch.full((3,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(ours[1].running_mean, 0.1 * ours[0](x[:4]).mean(0).detach(), rtol=0, atol=1e-12)
    alone = Virtual(nn.Sequential(nn.Linear(5, 3), NormAct1d(3)).double(), 4)
    (y,) = alone.step([([0], [1], x[:1])])
    assert torch.equal(y, torch.zeros(1, 3, dtype=torch.float64))
    assert alone.model[1].running_var.eq(1).all() and alone.model[0].weight.grad.abs().max() == 0


class NormAct1d(nn.BatchNorm1d):
    def forward(self, x):
        return F.relu(super().forward(x))


def test_a_tail_moves_statistics_by_its_share():
    """Of kn samples B' are there: 1 - (1 - m)^(B'/kn), else one sample replaces a tenth of what an epoch measured."""
    ours = nn.BatchNorm2d(3).double()
    virtual, x = Virtual(ours), images(1)
    virtual.step([([0], [1], x)], share=1 / 16)
    momentum = 1 - 0.9 ** (1 / 16)
    torch.testing.assert_close(ours.running_mean, momentum * x.mean((0, 2, 3)), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- masks


def test_each_use_of_a_dropout_draws_its_own_mask():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return torch.stack([self.drop(x), self.drop(x)])

    model = Both()
    context = PassContext(3, 8)
    make_virtual(model, context)
    x = torch.ones(8, 1000)

    def masks(step, worker):
        context.begin(step, [worker], [8])
        return model(x) != 0

    first = masks(0, 0)
    assert torch.equal(first, masks(0, 0))
    for other in (first[1], masks(1, 0)[0], masks(0, 1)[0]):
        assert 0.45 < (first[0] == other).float().mean() < 0.55
    assert 0.45 < first.float().mean() < 0.55


@pytest.mark.parametrize("compiled", [False, True])
def test_what_backward_computes_again_is_what_forward_computed(compiled):
    """Dropout and BatchNorm used twice, inside checkpoints: masks, gradients and statistics of the plain model."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 1), Twice(recompute, p=0.4), nn.Conv2d(3, 2, 3))
        virtual = Virtual(model, 4, calls={"1.norm": 2})
        if compiled:
            model.stages = [model[1]]
            compiling.compile_parts(model, virtual.context, "stages", 8)
        for number in range(2):
            outputs = virtual.step([([0, 1], [8, 8], images(16).float())], number)
        found.append((outputs[0], [p.grad for p in model.parameters()], virtual.running.flat.clone()))
    (y, gradients, running), (y2, gradients2, running2) = found
    assert not torch.equal(y, torch.zeros_like(y))
    tolerance = {"rtol": 0, "atol": 0 if not compiled else 1e-4}
    torch.testing.assert_close(y2, y, **tolerance)
    torch.testing.assert_close(running2, running, **tolerance)
    for a, b in zip(gradients, gradients2, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4 if compiled else 0, atol=1e-3 if compiled else 0)


def test_a_compiled_part_inside_a_checkpoint_draws_its_masks_again():
    class Outer(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.stages = nn.Sequential(Twice(p=0.4))
            self.recompute = recompute

        def forward(self, x):
            x = self.conv(x)
            return checkpoint(self.stages[0], x, use_reentrant=False) if self.recompute else self.stages[0](x)

    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = Outer(recompute)
        virtual = Virtual(model, 8, calls={"stages.0.norm": 2})
        compiling.compile_parts(model, virtual.context, "stages", 8)
        (y,) = virtual.step([([0], [8], images(8).float())])
        found.append((y, model.conv.weight.grad, virtual.running.flat.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_that_forgets_the_generator_is_refused():
    class Forgets(Twice):
        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=False, preserve_rng_state=False)

    with pytest.raises(RunError, match="drop: computed again in backward .* preserve_rng_state=True"):
        Virtual(Forgets(p=0.4)).step([([0], [8], images(8).float())])


def test_dropout_over_more_rows_than_samples():
    """Attention: a row a head and sample. One worker a pass knows whose they are, several do not."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.drop = nn.Parameter(torch.ones(())), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop((x * self.weight).repeat_interleave(4, 0))

    virtual = Virtual(Heads())
    (y,) = virtual.step([([3], [8], torch.ones(8, 50))])
    assert y.shape[0] == 32 and 0.4 < (y != 0).float().mean() < 0.6
    with pytest.raises(RunError, match=r"drop \(Dropout\) gets 64 rows for 16 samples.*workers_per_pass = 1"):
        virtual.step([([0, 1], [8, 8], torch.ones(16, 50))])


# ---------------------------------------------------------------- refused by name


class Sparse(nn.Identity):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.eye(3).to_sparse())


@pytest.mark.parametrize("layer, says", [
    (nn.SyncBatchNorm(3), "sums statistics over all ranks"),
    (nn.BatchNorm2d(3, momentum=None), "momentum=None"),
    (nn.InstanceNorm2d(3, track_running_stats=True), "set track_running_stats=False"),
    (Sparse(), "has table, a sparse tensor"),
    (nn.LazyBatchNorm2d(), "no weights before its first forward"),
])  # fmt: skip
def test_layers_that_cannot_keep_the_promise_are_refused(layer, says):
    with pytest.raises(RequestError, match=rf"model: 1 \({type(layer).__name__}\).*{says}"):
        make_virtual(nn.Sequential(nn.Conv2d(3, 3, 1), layer), PassContext(0, 8))
