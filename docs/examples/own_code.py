"""All that can be one's own, in one file: data, model, loss, optimizer, schedule, metric, callback, logger.

    hpc-lbsgd train own_code.yaml                                        by recipe, alone
    hpc-lbsgd launch --np 3 --oversubscribe -- train own_code.yaml       on three ranks
    python own_code.py                                                   by a loop of one's own, alone or under mpirun

The weights are the same, bit for bit, all three ways.
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import hpc_lbsgd as lb


class Spirals:
    """Which of three spirals is a point on?"""

    classes = ["first", "second", "third"]

    def __init__(self, samples, seed):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(3, size=samples)
        radius = rng.uniform(0.2, 1.0, samples)
        angle = 4 * radius + 2 * np.pi * self.labels / 3
        self.points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)
        self.fingerprint = f"{samples} {seed}"

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return torch.from_numpy(self.points[index]), int(self.labels[index])


def data(part):
    return Spirals(610, seed=1) if part == "train" else Spirals(203, seed=2)


def model(channels, classes):
    return nn.Sequential(
        nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, classes),
    )  # fmt: skip


def loss(outputs, labels):
    """One a sample, shape (B,)."""
    return F.multi_margin_loss(outputs, labels, reduction="none")


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: the sign of a momentum, and decoupled weight decay. All it keeps is in self.state."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9, slow=0.99):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "slow": slow})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, fast, slow = group["lr"], group["momentum"], group["slow"]
            for p in group["params"]:
                kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"]).sub_(kept.lerp(p.grad, 1 - fast).sign(), alpha=lr)
                kept.lerp_(p.grad, 1 - slow)


def restarts(workers, lr, momentum, epochs):
    """A cosine from lr to a tenth of it every four epochs (after Loshchilov & Hutter 2017); the batch doubles in the
    second half."""

    def share(epoch):
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (epoch % 4) / 4))

    return [
        lb.Stage(0, workers, lr, momentum, share),
        lb.Stage(epochs // 2, 2 * workers, lr, momentum, share),
    ]


def margin(outputs, labels):
    """By how much the right class is ahead of the next: a value a sample, and the record has their mean."""
    right = outputs.gather(1, labels[:, None])[:, 0]
    others = outputs.scatter(1, labels[:, None], -math.inf).amax(1)
    return right - others


def worst_class(outputs, labels):
    """What share of the samples of class 0 is right: a sum and a count."""
    own = labels == 0
    return (outputs.argmax(1)[own] == 0).sum(), own.sum()


class Patience:
    """Ends the run, as done, when the loss has not fallen for five evaluations."""

    def on_start(self, record, view):
        self.best, self.waited = math.inf, 0

    def on_evaluation(self, record, view):
        self.waited = 0 if record["loss"] < self.best else self.waited + 1
        self.best = min(self.best, record["loss"])
        if self.waited == 5:
            view.finish()


def table(record, view):
    """A logger: evaluations as lines of a file."""
    if record["kind"] == "eval":
        with open(view.folder / "evaluations.csv", "a") as file:
            file.write(f"{record['step']},{record['loss']},{record['margin']}\n")


def main():
    """The same run by the library, for those who want the loop."""
    world = lb.init()
    training, held_out = data("train"), data("eval")
    schedule = lb.Schedule.of_recipe("own_code.yaml", len(training))
    torch.manual_seed(0)
    net = model(1, 3).to(world.device)
    matrices, vectors = [[p for p in net.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False)]
    optimizer = Lion([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=0.02)
    run = lb.distribute(net, optimizer)
    shuffle = lb.GlobalShuffle(training, schedule)
    for step in shuffle.steps(torch.utils.data.DataLoader(training, batch_sampler=shuffle)):
        for group in optimizer.param_groups:
            group["lr"] = step.lr
        for part in step.workers:
            with run.part(part):
                run.backward(loss(net(part.inputs), part.labels))
        if run.reduce(step):
            optimizer.step()
    found = lb.evaluate(run, held_out, {"margin": margin, "worst_class": worst_class})
    if world.rank == 0:
        print(found)
        if len(sys.argv) > 1:
            torch.save(net.state_dict(), sys.argv[1])


if __name__ == "__main__":
    main()
