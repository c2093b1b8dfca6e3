"""Weights to start from (`model.init_from`): those of an earlier run, or a state dict from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from hpc_lbsgd.errors import RequestError

HOLDERS = ("state_dict", "model", "model_state_dict")  # where trainers keep a state dict among other things
COMPILED = "_orig_mod."  # in names: torch.compile's, of a model or of a part
COUNTER = "num_batches_tracked"


def load_into(model: nn.Module, where: str) -> list[str]:
    """Fill a model with the weights of a file. Returns the names that start anew: those
    of a classifier for another number of classes (all dimensions agree but the first).

    Raises RequestError for a file that is none, whose names and shapes are another model's, or with values that are not
    finite.
    """
    own = model.state_dict()
    found = unwrapped(read(where), own)
    counters = {k for k in own.keys() ^ found.keys() if k.endswith(COUNTER)}
    missing, unknown = sorted(own.keys() - found.keys() - counters), sorted(found.keys() - own.keys() - counters)
    if missing or unknown:
        raise RequestError(
            f"model.init_from = {where}: the weights are of another model (missing {', '.join(missing[:5]) or 'none'}; "
            f"unknown {', '.join(unknown[:5]) or 'none'})"
        )
    other = [k for k in own if k in found and own[k].shape != found[k].shape]
    wrong = [k for k in other if own[k].dim() == 0 or own[k].shape[1:] != found[k].shape[1:]]
    stems = {k.rpartition(".")[0] for k in other}
    if wrong or len(stems) > 1:
        k = (wrong or other)[0]
        raise RequestError(
            f"model.init_from = {where}: {k} has shape {tuple(found[k].shape)}, {tuple(own[k].shape)} in this "
            "model; only one layer, the classifier, may differ, in its number of classes"
        )
    for k in sorted(
        own.keys() & found.keys()
    ):  # a run that diverged leaves such files, and training from one would too
        if not torch.isfinite(found[k]).all():
            raise RequestError(f"model.init_from = {where}: {k} has values that are not finite")
    with torch.no_grad():
        for name, value in own.items():
            if name in found and name not in other:
                value.copy_(found[name])
    return other


def read(where: str) -> dict[str, torch.Tensor]:
    """Names and tensors of a file."""
    path = Path(where)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise RequestError(f"model.init_from = {where}: pip install safetensors") from None
    except Exception as problem:  # torch and safetensors raise many kinds for what is no file of theirs
        said = getattr(problem, "strerror", None) or "neither torch's nor safetensors', or with more than tensors in it"
        raise RequestError(f"model.init_from = {where}: not a file of weights ({said})") from None
    for key in HOLDERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()) or not content:
        raise RequestError(f"model.init_from = {where}: not a state dict (names and tensors)")
    return content


def unwrapped(found: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """By the model's own names: what trains a model holds it as a part, and puts that part's name before all others
    (`module.` of DistributedDataParallel, `model.` of many Lightning modules). As it was where none of that fits."""

    def fits(names: Iterable[str]) -> bool:
        return {k for k in names if not k.endswith(COUNTER)} == {k for k in own if not k.endswith(COUNTER)}

    names = list(found) if fits(found) else [name.replace(COMPILED, "") for name in found]
    while not fits(names):
        heads = {name.partition(".")[0] if "." in name else "" for name in names}
        if len(heads) != 1 or heads == {""}:
            return found
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names, found.values(), strict=True))
