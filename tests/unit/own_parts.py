"""Parts of a user's own for tests, good and bad."""

import math
import random

import torch

import hpc_lbsgd as lb


def halves(workers, lr, momentum, epochs):
    return [lb.Stage(0, workers, lr, momentum), lb.Stage(1, 2 * workers, lr, momentum, lambda epoch: 1 / (1 + epoch))]


def drawn(workers, lr, momentum, epochs):
    return [lb.Stage(0, workers, lr, momentum, lambda epoch: random.random())]


def counted(workers, lr, momentum, epochs):
    calls = []
    return [lb.Stage(0, workers, lr, momentum, lambda epoch: calls.append(0) or 1 / len(calls))]


def late(workers, lr, momentum, epochs):
    return [lb.Stage(1, workers, lr, momentum)]


def split(workers, lr, momentum, epochs):
    return [lb.Stage(0, workers / 2, lr, momentum)]


def negative(workers, lr, momentum, epochs):
    return [lb.Stage(0, workers, lr, momentum, lambda epoch: 1 - epoch)]


def plain_list(workers, lr, momentum, epochs):
    return [lr] * epochs


def broken(workers, lr, momentum, epochs):
    return lr / (workers - workers)


# ---------------------------------------------------------------- metrics


def right(outputs, labels):
    return (outputs.argmax(1) == labels).float()


def mean(outputs, labels):
    return right(outputs, labels).mean()


def of_the_first(outputs, labels):
    own = labels == 0
    return right(outputs, labels)[own].sum(), own.sum()


def accuracy(outputs, labels):
    return right(outputs, labels)


# ---------------------------------------------------------------- callbacks


class Early:
    def on_evaluation(self, record, view):
        weights = view.weights()
        assert all(t.device.type == "cpu" for t in weights.values())
        next(iter(weights.values())).zero_()  # a copy: harmless
        if record["step"] >= 4:
            view.finish()


class Misspelt:
    def on_stpe(self, record, view):
        pass


class Deaf:
    pass


class Picky:
    def __init__(self, colour):
        pass

    def on_step(self, record, view):
        pass


def quits(record, view):
    raise SystemExit(3)


def threads(record, view):
    torch.set_num_threads(torch.get_num_threads() + 1)


# ---------------------------------------------------------------- optimizers


class Moving(torch.optim.Optimizer):
    """`move` is what becomes of a parameter."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.move(p, group["lr"])


class Forgetful(Moving):
    """Keeps its momentum where no state dict has it."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.kept = {}

    def move(self, p, lr):
        self.kept[p] = 0.9 * self.kept.get(p, 0.0) + p.grad
        p.sub_(self.kept[p], alpha=lr)


class Drawing(Moving):
    def move(self, p, lr):
        p.sub_(p.grad + 0.01 * torch.randn_like(p), alpha=lr)


class Replacing(Moving):
    def move(self, p, lr):
        p.data = p.data - lr * p.grad


def half_of_it(params, lr):
    return torch.optim.SGD(params[:1], lr=lr)


def no_rate(params):
    return torch.optim.SGD(params, lr=0.1)


def not_one(params, lr):
    return math.inf
