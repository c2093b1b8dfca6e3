"""The models by name, initialised as Goyal et al. 2017, section 5.1 say."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.imports import load
from hpc_lbsgd.train import start
from hpc_lbsgd.train.laps import kept_for_good
from hpc_lbsgd.train.refusals import refuse, refuse_shared_memory


class Block(nn.Module):
    """Basic residual block (He et al. 2015, figure 2): two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """The CIFAR ResNet of 6n+2 layers (He et al. 2015, section 4.2), with projection shortcuts.

    widths: channels of the three stages; blocks: n; stem 'pool' and 'stride': the picture is halved after the first
    convolution, or by it.
    """

    def __init__(self, channels: int, classes: int, blocks: int, widths: list[int], stem: str, dropout: float):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 2 if stem == "stride" else 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        if stem == "pool":
            self.stem.append(nn.MaxPool2d(2))
        inputs, stages = widths[0], []
        for stage, width in enumerate(widths):
            stages.append(
                nn.Sequential(
                    *[Block(inputs if i == 0 else width, width, 2 if stage and i == 0 else 1) for i in range(blocks)]
                )
            )
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        return self.fc(self.dropout(self.stages(self.stem(x)).mean((2, 3))))


class PreactivationBlock(nn.Module):
    """Wide residual block (Zagoruyko & Komodakis 2016): BatchNorm and ReLU before each 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x):
        y = F.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + shortcut


class WideResNet(nn.Module):
    """WRN-16-4: three stages of two blocks, 64, 128 and 256 channels."""

    def __init__(self, channels: int, classes: int, dropout: float):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stages = nn.Sequential(
            *[
                nn.Sequential(PreactivationBlock(inputs, outputs, stride), PreactivationBlock(outputs, outputs, 1))
                for inputs, outputs, stride in ((16, 64, 1), (64, 128, 2), (128, 256, 2))
            ]
        )
        self.norm = nn.BatchNorm2d(256)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(256, classes)

    def forward(self, x):
        return self.fc(self.dropout(F.relu(self.norm(self.stages(self.stem(x)))).mean((2, 3))))


def _inception(section, channels: int, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise RequestError("model.name = inception-resnet-v2 comes from timm: pip install timm") from None
    return timm.create_model("inception_resnet_v2", num_classes=classes, in_chans=channels, drop_rate=section.dropout)


def _small(section, channels: int, classes: int, blocks: int) -> nn.Module:
    return SmallResNet(channels, classes, blocks, section.widths or [16, 32, 64], section.stem, section.dropout)


@functools.cache
def _zoo():
    with kept_for_good():  # it brings torch's compiler
        import torchvision
    return torchvision.models


def _torchvision(section, channels: int, classes: int, name: str) -> nn.Module:
    model = getattr(_zoo(), name)(num_classes=classes)  # stride 2 in the 3x3 convolution, as Goyal
    if channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    if section.dropout:
        model.fc = nn.Sequential(nn.Dropout(section.dropout), model.fc)
    return model


MODELS = {
    "resnet8": lambda s, channels, classes: _small(s, channels, classes, 1),
    "resnet20": lambda s, channels, classes: _small(s, channels, classes, 3),
    "wrn-16-4": lambda s, channels, classes: WideResNet(channels, classes, s.dropout),
    "inception-resnet-v2": _inception,
    "resnet50": lambda s, channels, classes: _torchvision(s, channels, classes, "resnet50"),
    "resnet101": lambda s, channels, classes: _torchvision(s, channels, classes, "resnet101"),
}


def build(
    section, channels: int, classes: int, seed: int, dtype: torch.dtype = torch.float32, fresh: bool = False
) -> nn.Module:
    """The model of a recipe's `model` section, on the CPU; the same weights for the same seed on every rank.

    fresh: leave `init_from` alone, for those who bring weights of their own, or none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if ":" in section.name:  # the user's own, initialised by its author
            model = load(section.name, "model.name")(channels, classes)
            if not isinstance(model, nn.Module):
                raise RequestError(f"model.name = {section.name}: returned {type(model).__name__}, not a torch module")
            for name, module in model.named_modules():  # before a change of type would hide what it was
                refuse(name, module)
            refuse_shared_memory(model)
        else:
            model = MODELS[section.name](section, channels, classes)
            initialise(model, section.zero_gamma)
    if section.init_from and not fresh:
        start.load_into(model, section.init_from)
    return model.to(dtype)


def without_storage(recipe, classes: int) -> nn.Module:
    """The model of a recipe on device meta: shapes and names only."""
    with torch.device("meta"):
        return build(recipe.model, recipe.data.channels, classes, recipe.seed, fresh=True)


def initialise(model: nn.Module, zero_gamma: bool) -> None:
    """He's for convolutions, N(0, 0.01^2) for the classifier, gamma = 1; with zero_gamma, gamma = 0 in each
    residual block's last BatchNorm, so that blocks start as identity (Goyal et al. 2017, section 5.1)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    if zero_gamma:
        for module in model.modules():
            last = getattr(module, "bn3", None) or getattr(module, "bn2", None)
            if last is not None:
                nn.init.zeros_(last.weight)


def frozen_in(model: nn.Module) -> list[nn.Module]:
    """Modules that their author has put into evaluation, in a model that trains: they stay so."""
    return [m for m in model.modules() if not m.training] if model.training else []


def train(model: nn.Module, frozen: list[nn.Module]) -> None:
    """Into training, as the author's own `train` has it, but for what is frozen."""
    model.train()
    for module in frozen:
        module.training = False
