"""Models that cannot keep the promise, by their classes and their memory. Preflight finds others by what they do."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from hpc_lbsgd.errors import RequestError


def refuse(name: str, module: nn.Module) -> None:
    """Raise RequestError for a layer of a class whose state would depend on how many ranks there are, or be lost."""
    what = f"model: {name or 'the model itself'} ({type(module).__name__})"
    if isinstance(module, nn.SyncBatchNorm):
        raise RequestError(
            f"{what} sums statistics over all ranks, so that the result depends on their number; use nn.BatchNorm, and "
            "set batch.bn_group to the samples that it is to see together"
        )
    if isinstance(module, _BatchNorm) and module.momentum is None:
        raise RequestError(f"{what} has momentum=None (a cumulative average); set a momentum, such as 0.1")
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        raise RequestError(
            f"{what} has running statistics, which each rank would keep for itself; set track_running_stats=False"
        )
    if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise RequestError(
            f"{what} has max_norm, with which each forward writes into the weights: every rank would do so by itself; "
            "leave max_norm out, and divide by the norm where the rows are used"
        )
    if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise RequestError(f"{what} has sparse gradients, and sums over ranks are dense; set sparse=False")
    hooks = {type(h).__name__ for h in module._forward_pre_hooks.values()}
    if type(module).__name__ == "_SpectralNorm" or "SpectralNorm" in hooks:  # torch has it twice, both private
        raise RequestError(
            f"{what} is spectral_norm, whose vectors are changed by each forward: every rank and pass would change "
            "them by itself; leave it out"
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise RequestError(f"{what} has no weights before its first forward; run one in the function that makes it")
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise RequestError(f"{what} has get_extra_state: what is no tensor is neither compared nor kept; use buffers")
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.layout != torch.strided:
            raise RequestError(f"{what} has {key}, a sparse tensor, which ranks cannot compare; make it dense")
        if tensor.is_complex():
            raise RequestError(f"{what} has {key}, a complex tensor; hold its real and imaginary parts as two")


def refuse_shared_memory(model: nn.Module) -> None:
    """Raise RequestError where a parameter that trains shares memory with another tensor under another name: buckets
    give each its own. What is one Parameter at several places is fine."""
    trained = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    places = []  # (storage, first byte, byte after the last, trains, name)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.numel() and tensor.device.type != "meta":
            first = tensor.storage_offset()
            last = first + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = tensor.element_size()
            storage = tensor.untyped_storage().data_ptr()
            places.append((storage, first * size, (last + 1) * size, id(tensor) in trained, name))
    open_places: list[tuple] = []
    for place in sorted(places):
        storage, first, _, trains, name = place
        open_places = [p for p in open_places if p[0] == storage and p[2] > first]
        other = next((p for p in open_places if trains or p[3]), None)
        if other:
            raise RequestError(
                f"model: {name} and {other[4]} lie in the same memory and are two tensors; here each would have its "
                "own. Make them one (a.weight = b.weight), or compute one from the other in forward"
            )
        open_places.append(place)
