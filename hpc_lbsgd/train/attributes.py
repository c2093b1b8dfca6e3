"""What a model keeps in attributes of Python: state that no step sums, no checkpoint keeps and no rank compares."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count
from types import FunctionType, ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import nn

OWN = frozenset(vars(nn.Module()))  # what every module has
DEPTH = 4  # of containers and objects within attributes


def snapshot(model: object) -> dict[str, str]:
    """{name: digest} of the attributes of a model and its layers, or of any object; what cannot be read is left out."""
    layers = model.named_modules() if isinstance(model, nn.Module) else [("", model)]
    found = {}
    if isinstance(model, FunctionType):
        layers = [("", SimpleNamespace(closure=model))]
    for name, layer in layers:
        for key, value in getattr(layer, "__dict__", {}).items():
            if key not in OWN:
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
        yield from bytes_of(value)
    elif isinstance(value, (nn.Module, type, ModuleType)) or depth == 0:
        return  # a layer is looked at where it is one
    elif isinstance(value, torch.Generator):
        yield from bytes_of(value.get_state())
    elif isinstance(value, np.random.Generator):
        yield repr(value.bit_generator.state).encode()
    elif isinstance(value, (random.Random, count)):
        yield repr(value.getstate() if isinstance(value, random.Random) else value).encode()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from parts(key, depth - 1)
            yield from parts(item, depth - 1)
    elif isinstance(value, (list, tuple, deque)):
        for item in value:
            yield from parts(item, depth - 1)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(b"".join(parts(item, depth - 1)) for item in value)
    elif isinstance(value, FunctionType):  # what it closes over
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # nothing in it yet
                yield from parts(cell.cell_contents, depth - 1)
    elif isinstance(getattr(value, "__dict__", None), dict):
        yield from parts(vars(value), depth - 1)


def bytes_of(value) -> Iterator[bytes]:
    """Of a tensor or an array; none where it has none of its own."""
    if not isinstance(value, torch.Tensor):
        yield np.asarray(value).tobytes()
        return
    with suppress(RuntimeError, NotImplementedError, TypeError):  # nested, sparse, meta
        whole = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        yield whole.view(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
