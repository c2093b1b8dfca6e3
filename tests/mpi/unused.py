"""A model with a layer that no pass uses."""

from torch import nn


class Partly(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.used = nn.Linear(channels * 64, classes)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x.flatten(1))


def model(channels, classes):
    return Partly(channels, classes)


def frozen(channels, classes):
    partly = Partly(channels, classes)
    partly.unused.requires_grad_(False)
    return partly
