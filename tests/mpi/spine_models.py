"""Data and models of users who bring trouble."""

import os

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations

BAD = (17, 90)  # samples that are not finite, of `with_bad_samples`


class Vectors:
    """48 numbers a sample, float64; the class is their largest quarter."""

    classes = ("a", "b", "c", "d")

    def __init__(self, samples, seed, bad=()):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(samples, 48))
        self.y = rng.integers(0, 4, samples)
        for i, label in enumerate(self.y):
            self.x[i, 12 * label : 12 * label + 12] += 0.7
        self.x[list(bad)] = np.nan

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


def vectors(part):
    return Vectors(150 if part == "train" else 31, part == "eval")


def with_bad_samples(part):
    return Vectors(150, 0, BAD) if part == "train" else Vectors(31, 1)


def net(channels, classes):
    model = nn.Sequential(nn.Linear(48, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, classes))
    model.register_buffer("unit", torch.ones(1).expand(5))  # five elements in the place of one
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool), persistent=False)  # Horovod does not know its type
    return model


def spectral(channels, classes):
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(48, 16)), nn.ReLU(), nn.Linear(16, classes))


def threads_on_rank_1(channels, classes):
    if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
        torch.set_num_threads(2)
    return net(channels, classes)


class OwnWeights(nn.Module):
    """Its weights come from a generator that no seed of ours reaches."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 4)
        with torch.no_grad():
            self.layer.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(4, 48)) * 0.1))

    def forward(self, x):
        return self.layer(x)


def own_weights(channels, classes):
    return OwnWeights()


def frozen_net(channels, classes):
    model = net(channels, classes)
    model[1].eval()
    return model


class Drifts(nn.Module):
    """Every 30th forward changes a buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.count = nn.Linear(48, 4), 0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.count += self.training
        if self.count % 30 == 29:
            self.scale *= 0.97
        return self.layer(x) * self.scale


def drifts(channels, classes):
    return Drifts()


class Drifting(Vectors):
    """Draws from a generator that is not the sample's."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + np.random.default_rng().normal(size=48), y


def drifting_data(part):
    return Drifting(150, 0)
