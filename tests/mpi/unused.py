"""Models whose gradients are not one a parameter and pass: unused, frozen, shared, and used by some samples only."""

from torch import nn


class Partly(nn.Module):
    """A layer that no pass uses."""

    def __init__(self, channels, classes):
        super().__init__()
        self.used = nn.Linear(channels * 64, classes)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x.flatten(1))


class Shared(nn.Module):
    """One layer at two places, and its weight under a second name."""

    def __init__(self, channels, classes):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(channels * 64, 16), nn.Linear(16, 16), nn.Linear(16, classes)
        self.same = self.layer
        self.tied = self.layer.weight

    def forward(self, x):
        x = self.layer(self.first(x.flatten(1)).relu()).relu()
        return self.last(nn.functional.linear(self.same(x).relu(), self.tied))


class Sometimes(nn.Module):
    """A layer for bright pictures only: in some passes, and so on some ranks, it has no gradient (`None`)."""

    def __init__(self, channels, classes):
        super().__init__()
        self.always, self.sometimes = nn.Linear(channels * 64, classes), nn.Linear(channels * 64, classes)

    def forward(self, x):
        x = x.flatten(1)
        bright = x.mean(1) > 0.3
        y = self.always(x)
        return y.index_add(0, bright.nonzero()[:, 0], self.sometimes(x[bright])) if bright.any() else y


class Branches(nn.Module):
    """Layers of one size, called in an order that follows from the pictures: each rank has their gradients in its own.
    The last layer is called for some pictures only."""

    def __init__(self, channels, classes):
        super().__init__()
        self.first, self.last = nn.Linear(channels * 64, 16), nn.Linear(16, classes)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        x = x.flatten(1)
        turn = int(x.mean() * 1e4) % 5
        hidden = self.first(x).relu()
        for i in [*((turn + i) % 5 for i in range(5)), *([5] if turn == 0 else [])]:
            hidden = hidden + self.layers[i](hidden).relu()
        return self.last(hidden)


def model(channels, classes):
    return Partly(channels, classes)


def frozen(channels, classes):
    partly = Partly(channels, classes)
    partly.unused.requires_grad_(False)
    return partly


def shared(channels, classes):
    return Shared(channels, classes)


def sometimes(channels, classes):
    return Sometimes(channels, classes)


def branches(channels, classes):
    return Branches(channels, classes)
