"""The library, as a script of one's own uses it: in one process, with the torch engine."""

import subprocess
import sys

import pytest
import torch
from conftest import SMALL_RECIPE, changed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpc_lbsgd as lb
from hpc_lbsgd.recipe import validate
from hpc_lbsgd.train import models, step
from hpc_lbsgd.train.replica import Replica, weights_sha256

N = 203
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def world():
    threads, debug = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield lb.init("torch")
    lb.close()
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(debug)


def small_data(dtype=torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(N) % 4
    images = torch.randn(N, 1, 8, 8, generator=generator, dtype=torch.float64) + labels.view(-1, 1, 1, 1) / 2
    return TensorDataset(images.to(dtype), labels)


def small_schedule(**more) -> lb.Schedule:
    given = {"samples": N, "workers": 4, "samples_per_worker": 8, "epochs": 3, "lr": 0.1, "warmup_epochs": 1} | more
    return lb.Schedule(**given)


def small_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(216, 4)
    ).to(dtype)  # fmt: skip


def sgd(model: nn.Module, **more) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, **more)


def train(run, shuffle, data, steps=None, noise=None, after=lambda: None) -> list[lb.Verdict]:
    """The loop of docs/api.md."""
    criterion, verdicts = nn.CrossEntropyLoss(reduction="none"), []
    for step in shuffle.steps(DataLoader(data, batch_sampler=shuffle)):
        if step.step == steps:
            break
        for group in run.optimizer.param_groups:
            group["lr"] = step.lr
        for part in step.workers:
            with run.part(part):
                run.backward(criterion(run.model(part.inputs), part.labels))
        verdicts.append(run.reduce(step))
        if noise:
            noise.add(verdicts[-1])
        if verdicts[-1]:
            after()
            run.optimizer.step()
        run.optimizer.zero_grad()
    return verdicts


def one_step(run, schedule=None, data=None):
    """Up to the loss of the first part of a step."""
    shuffle = lb.GlobalShuffle(N, schedule or small_schedule(), seed=1)
    return next(iter(shuffle.steps(DataLoader(data or small_data(), batch_sampler=shuffle))))


@pytest.fixture
def run():
    model = small_model()
    return lb.distribute(model, sgd(model), seed=1)


def losses_of(run, part) -> torch.Tensor:
    return nn.functional.cross_entropy(run.model(part.inputs), part.labels, reduction="none")


def compute(run, step) -> None:
    for part in step.workers:
        with run.part(part):
            run.backward(losses_of(run, part))


# ---------------------------------------------------------------- as the trainer


def by_trainer(recipe, data) -> nn.Module:
    """The weights of 20 steps, by the trainer's own parts."""
    recipe = validate(recipe)
    schedule = recipe.build_schedule(N)
    engine = lb.init("torch").engine
    replica = Replica(recipe, 4, engine, CPU)
    requests = step.Passes(recipe, 0, 1).requests(schedule, recipe.seed, 0, 20)
    batches = ((*(t[torch.from_numpy(r.samples)] for t in data.tensors), 0) for r in requests)
    stepper = step.Stepper(replica, recipe, batches)
    for number in range(20):
        assert stepper.run(schedule.at(number)).finite
    return replica.model


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_script_makes_the_weights_that_the_trainer_makes(precision):
    dtype = getattr(torch, precision)
    content, data = changed(SMALL_RECIPE, precision=precision, data__train="x", data__eval="x"), small_data(dtype)
    theirs = by_trainer(content, data)
    recipe = validate(content)
    model = models.build(recipe.model, 1, 4, recipe.seed, dtype).to(memory_format=torch.channels_last)
    plain = [p for p in model.parameters() if p.dim() <= 1]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 1e-3}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=recipe.optim.nesterov)
    run = lb.distribute(model, optimizer, seed=recipe.seed, bn_group=4)
    shuffle = lb.GlobalShuffle(data, recipe.build_schedule(N), seed=recipe.seed)
    assert all(train(run, shuffle, data))
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-9 if precision == "float64" else 0)
    if precision == "float32":
        assert weights_sha256(model) == weights_sha256(theirs)
