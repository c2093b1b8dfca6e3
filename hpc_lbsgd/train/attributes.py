"""What a model keeps in attributes of Python: state that no step sums, no checkpoint keeps and no rank compares."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

OWN = frozenset(vars(nn.Module()))  # what every module has
DEPTH = 4  # of containers and objects within attributes


def snapshot(model: object) -> dict[str, str]:
    """{name: digest} of the attributes of a model and its layers, or of any object; what cannot be read is left out."""
    layers = model.named_modules() if isinstance(model, nn.Module) else [("", model)]
    found = {}
    for name, layer in layers:
        for key, value in getattr(layer, "__dict__", {}).items():
            if key not in OWN and key != "forward":
                digest = hashlib.sha256()
                for part in parts(value, DEPTH):
                    digest.update(part)
                found[f"{name}.{key}".lstrip(".")] = digest.hexdigest()
    return found


def parts(value: object, depth: int) -> Iterator[bytes]:
    """Bytes that tell a value from another; none of what is not plain data."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        yield f"{type(value).__name__} {value!r};".encode()
    elif isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type == "meta":
                return
            value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b""
        yield value if isinstance(value, bytes) else value.tobytes()
    elif isinstance(value, nn.Module) or depth == 0:
        return  # a layer is looked at where it is one
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from parts(key, depth - 1)
            yield from parts(item, depth - 1)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            yield from parts(item, depth - 1)
    elif isinstance(value, (set, frozenset)):
        for item in sorted(map(repr, value)):
            yield item.encode()
    elif hasattr(value, "__dict__") and not callable(value):
        yield from parts(vars(value), depth - 1)
