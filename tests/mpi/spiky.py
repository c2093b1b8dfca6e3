"""Data and a model whose gradients int32 has to follow: a spike of one worker, layers without a gradient for many
steps or for ever, and a tail of one sample."""

import numpy as np
import torch
from spine_models import Vectors
from torch import nn

SPIKES, BAD = (23, 77), (50,)  # samples; a step has 20


class Marked(Vectors):
    def __init__(self, samples, seed, spikes=(), bad=()):
        super().__init__(samples, seed, bad)
        self.x = self.x.astype(np.float32)
        self.x[list(spikes), 47] = 0.0


def data(part):
    return Marked(121, 0, SPIKES) if part == "train" else Marked(31, 1)


def with_a_bad_sample(part):
    return Marked(121, 0, SPIKES, BAD) if part == "train" else Marked(31, 1)


class Net(nn.Module):
    """`spiky` has a gradient 2^20 times as large where a sample is marked; `seldom` is used by few samples."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.dropout, self.last = nn.Dropout(0.1), nn.Linear(128, classes)
        self.spiky, self.seldom, self.never = nn.Linear(48, classes), nn.Linear(48, classes), nn.Linear(3, 3)

    def forward(self, x):
        y = self.last(self.dropout(self.features(x.view(-1, 3, 4, 4))))
        y = y + self.spiky(x) * torch.where(x[:, 47] == 0, 2.0**-4, 2.0**-24)[:, None]
        chosen = x[:, 0] > 2.0
        return y.index_add(0, chosen.nonzero()[:, 0], self.seldom(x[chosen])) if chosen.any() else y


def net(channels, classes):
    return Net(classes)
