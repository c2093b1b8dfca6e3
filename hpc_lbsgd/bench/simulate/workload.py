"""A model as the simulator sees it: parameters and FLOP, layer by layer.

Layers of the presets' and the shipped recipes' models are stored, so that no prediction and no plan of them need start
PyTorch. `python -m hpc_lbsgd.bench.simulate.workload` counts and stores them again.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.theory.simulate import Layer

STORED = resources.files("hpc_lbsgd.bench.simulate") / "layers.json"


@cache
def stored() -> dict[str, tuple[Layer, ...]]:
    return {name: tuple(Layer(*pair) for pair in pairs) for name, pairs in json.loads(STORED.read_text()).items()}


def layers(recipe: Recipe, classes: int) -> tuple[Layer, ...]:
    """Layers of a recipe's model."""
    return known(recipe, classes) or counted(recipe, classes)


def known(recipe: Recipe, classes: int) -> tuple[Layer, ...] | None:
    """The same where the model is stored: its last layer, the classifier, is made to have so many classes."""
    found = stored().get(name_of(recipe))
    if not found:
        return None
    *body, last = found
    inputs = last.flop / 2 / (last.parameters - last.flop / 2)  # C classes: 2 inputs C, and (inputs + 1) C parameters
    return (*body, Layer(round((inputs + 1) * classes), round(2 * inputs * classes)))


def name_of(recipe: Recipe) -> str:
    """What a recipe's model is stored under: all that its layers depend on, but for the classes."""
    model, data = recipe.model, recipe.data
    words = [model.name, "-".join(map(str, model.widths or ())), model.stem if model.stem != "plain" else ""]
    if (data.channels, data.image_size) != (3, 224):
        words.append(f"{data.channels}x{data.image_size}")
    return " ".join(word for word in words if word)


# ---------------------------------------------------------------- counting


def counted(recipe: Recipe, classes: int) -> tuple[Layer, ...]:
    from hpc_lbsgd.train import models

    return layers_of(models.without_storage(recipe, classes), recipe.data.channels, recipe.data.image_size)


def layers_of(model, channels: int, image_size: int) -> tuple[Layer, ...]:
    """Layers with parameters in the order forward meets them, on a model without storage (device meta).

    FLOP an image: two for each multiplication of convolutions and linear layers; others count as nothing.
    """
    import torch
    from torch import nn

    found: list[Layer] = []

    def seen(module, inputs, output):
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        if not parameters:
            return
        flop = 0
        if isinstance(module, nn.Conv2d):
            flop = 2 * module.weight.numel() * output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            flop = 2 * module.weight.numel()
        found.append(Layer(parameters, flop))

    handles = [module.register_forward_hook(seen) for module in model.modules()]
    with torch.device("meta"):
        model(torch.empty(2, channels, image_size, image_size))
    for handle in handles:
        handle.remove()
    return tuple(found)


def count_all() -> dict[str, tuple[Layer, ...]]:
    """What is stored: torchvision's models in the shapes of the papers (Inception V3 without its second classifier,
    which tf_cnn_benchmarks leaves out), and the models of the shipped recipes."""
    import torch
    import torchvision.models as shipped

    with torch.device("meta"):
        models = {
            "resnet50": (shipped.resnet50(), 224),
            "resnet101": (shipped.resnet101(), 224),
            "vgg16": (shipped.vgg16(init_weights=False), 224),
            "inception3": (shipped.inception_v3(aux_logits=False, init_weights=False), 299),
        }
    found = {name: layers_of(model, 3, size) for name, (model, size) in models.items()}
    for recipe in map(recipes.read, recipes.shipped()):
        if name_of(recipe) not in found:
            found[name_of(recipe)] = counted(recipe, recipe.data.classes)
    return found


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(each, separators=(',', ':'))}" for name, each in count_all().items()]
    Path(str(STORED)).write_text("{\n" + ",\n".join(lines) + "\n}\n")
