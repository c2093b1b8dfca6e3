"""Models as users write them: factories (channels, classes) for pictures of 6x6, each with one thing that a training
loop could get wrong."""

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Plain(nn.Module):
    """Two convolutions with `norm` after each. Statistics start away from 0 and 1, so that a layer that starts anew
    or is left alone can be told."""

    norm, norm_keys = nn.BatchNorm2d, {}

    def __init__(self, channels, classes):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(c, WIDTH, 3, padding=1, bias=False) for c in (channels, WIDTH))
        self.norm1, self.norm2 = (self.norm(WIDTH, **self.norm_keys) for _ in range(2))
        self.fc = nn.Linear(WIDTH, classes)
        for m in self.modules():
            if getattr(m, "running_mean", None) is not None:
                nn.init.normal_(m.running_mean)
                nn.init.uniform_(m.running_var, 0.5, 2)

    def forward(self, x):
        return self.head(self.conv2(self.stem(x)))

    def stem(self, x):
        return F.silu(self.norm1(self.conv1(x)))

    def head(self, x):
        return self.fc(F.silu(self.norm2(x)).mean((2, 3)))


class Slow(Plain):
    """A momentum of its own."""

    norm_keys = {"momentum": 0.03}


class NotAffine(Plain):
    norm_keys = {"affine": False}


class NoRunning(Plain):
    """Normalises by the batch in evaluation too."""

    norm_keys = {"track_running_stats": False}


class Groups(Plain):
    norm, norm_keys = nn.GroupNorm, {"num_channels": WIDTH}

    def __init__(self, channels, classes):
        self.norm = lambda width, **keys: nn.GroupNorm(2, **keys)
        super().__init__(channels, classes)


class NormAct(nn.BatchNorm2d):
    """BatchNorm with a forward of its own: what it does besides must not get lost."""

    def __init__(self, width):
        super().__init__(width)
        self.gain = nn.Parameter(torch.full((width, 1, 1), 1.5))

    def forward(self, x):
        return F.relu6(super().forward(self.gain * x + x.square()))


class Subclassed(Plain):
    norm = NormAct


class Timms(Plain):
    """timm's norm and activation in one module, which calls F.batch_norm itself."""

    norm = BatchNormAct2d


class Twice(Plain):
    """One BatchNorm at two places of a forward: it measures twice a step."""

    def forward(self, x):
        return self.head(self.norm2(self.conv2(self.stem(x))))


class FrozenNorm(Plain):
    """Fine-tuning: the first BatchNorm stays in evaluation mode, its gamma and beta learn."""

    def train(self, mode=True):
        super().train(mode)
        self.norm1.eval()
        return self


class Branch(Plain):
    """A BatchNorm that only bright workers use, and with it a layer without a gradient on the others."""

    limit = 0.0

    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.extra, self.extra_norm = nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        y = self.conv2(self.stem(x))
        return self.head(y + self.extra_norm(self.extra(y)) if x.mean() > self.limit else y)


class NeverTaken(Branch):
    """No worker goes there."""

    limit = 1e9


class OnceOrTwice(Plain):
    """Bright workers use the layer a second time: two slots, of which the second has fewer measurements."""

    def forward(self, x):
        y = self.norm2(self.conv2(self.stem(x)))
        return self.head(self.conv2(y) if x.mean() > 0 else y)


class Recomputed(Plain):
    """Its BatchNorm runs again in backward; means what Plain means."""

    def forward(self, x):
        return self.head(self.conv2(checkpoint(self.stem, x, use_reentrant=False)))


class Vectors(nn.Module):
    """BatchNorm1d: a tail of one sample has one value a channel."""

    def __init__(self, channels, classes):
        super().__init__()
        self.hidden, self.norm, self.last = nn.Linear(channels * 36, 10), nn.BatchNorm1d(10), nn.Linear(10, classes)

    def forward(self, x):
        return self.last(F.silu(self.norm(self.hidden(x.flatten(1)))))


class Shared(nn.Module):
    """One layer at two places, and its weight under a second name."""

    def __init__(self, channels, classes):
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(channels, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(24, classes)
        self.same, self.tied = self.layer, self.layer.weight
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x):
        x = self.layer(F.silu(self.first(x)))
        return self.last(F.conv2d(self.pad(F.silu(self.same(self.pad(F.silu(x))))), self.tied, padding=0).flatten(1))


class FrozenParameters(Plain):
    """A fixed first convolution and fixed gamma and beta; statistics go on."""

    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.conv1.requires_grad_(False)
        self.norm1.requires_grad_(False)


class Unused(Plain):
    """A layer that no forward uses: its weight decays, its bias stays."""

    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.unused, self.unused_norm = nn.Linear(3, 3), nn.BatchNorm2d(3)


class Attention(nn.Module):
    """A transformer's layer over the rows of a picture."""

    def __init__(self, channels, classes):
        super().__init__()
        self.embed, self.places = nn.Linear(channels * 6, 8), nn.Parameter(torch.randn(6, 8) / 5)
        self.norm1, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.last = nn.Linear(8, classes)

    def forward(self, x):
        x = self.embed(x.transpose(1, 2).flatten(2)) + self.places
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.last((x + self.mlp(self.norm2(x))).mean(1))


class OneWeightASample(nn.Module):
    """Weight i sees sample i alone: samples are unit vectors."""

    def __init__(self, channels, classes):
        super().__init__()
        self.weights = nn.Linear(49, 1, bias=False)
        nn.init.zeros_(self.weights.weight)

    def forward(self, x):
        return self.weights(x)


def output_itself(outputs, labels):
    """A loss that is linear in the weights: every gradient is a sample's input."""
    return outputs[:, 0]
