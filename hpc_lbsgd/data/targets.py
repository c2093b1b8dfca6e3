"""What a loss compares a batch's outputs with: a tensor of a row a sample, or several by name.

One field is its tensor; several (`data.targets`) are a dict of theirs, in the recipe's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Targets = Any  # torch.Tensor | dict[str, torch.Tensor]


def each(function: Callable[..., torch.Tensor], targets: Targets, *others: Targets) -> Targets:
    """`function` of each tensor (and the same one of others), held as they were."""
    if isinstance(targets, dict):
        return {name: each(function, value, *(other[name] for other in others)) for name, value in targets.items()}
    return function(targets, *others)


def tensors(targets: Targets) -> list[torch.Tensor]:
    return list(targets.values()) if isinstance(targets, dict) else [targets]


def rows(targets: Targets) -> int:
    """Samples."""
    return len(tensors(targets)[0])


def joined(parts: Sequence[Targets]) -> Targets:
    """Samples of several batches, in order."""
    return each(lambda *some: torch.cat(some), *parts)


def one_or_all(by_name: dict[str, torch.Tensor]) -> Targets:
    return by_name if len(by_name) > 1 else next(iter(by_name.values()))
