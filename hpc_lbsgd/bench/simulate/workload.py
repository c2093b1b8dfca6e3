"""A model as the simulator sees it: parameters and FLOP, layer by layer."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from hpc_lbsgd.theory.simulate import Layer


@cache
def stored() -> dict[str, tuple[Layer, ...]]:
    """Layers of the presets' models, from layers.json, so that a prediction need not start PyTorch."""
    text = (resources.files("hpc_lbsgd.bench.simulate") / "layers.json").read_text()
    return {name: tuple(Layer(*pair) for pair in pairs) for name, pairs in json.loads(text).items()}


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


def published_models() -> dict[str, tuple[Layer, ...]]:
    """What layers.json holds: torchvision's models in the shapes of the papers (Inception V3 without its second
    classifier, which tf_cnn_benchmarks leaves out)."""
    import torch
    import torchvision.models as shipped

    with torch.device("meta"):
        models = {
            "resnet50": (shipped.resnet50(), 224),
            "resnet101": (shipped.resnet101(), 224),
            "vgg16": (shipped.vgg16(init_weights=False), 224),
            "inception3": (shipped.inception_v3(aux_logits=False, init_weights=False), 299),
        }
    return {name: layers_of(model, 3, size) for name, (model, size) in models.items()}
