"""What a model is given, and what a loss compares its outputs with: a tensor of a row a sample, or a list of a tensor
for each; or several of these by name.

One field is its own; several (`data.inputs`, `data.targets`) are a dict of theirs, in the recipe's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Target = Any  # torch.Tensor | list[torch.Tensor]
Targets = Any  # Target | dict[str, Target]
Inputs = Targets


def each(function: Callable[..., Target], targets: Targets, *others: Targets) -> Targets:
    """`function` of each target (and the same one of others), held as they were."""
    if isinstance(targets, dict):
        return {name: function(value, *(other[name] for other in others)) for name, value in targets.items()}
    return function(targets, *others)


def each_tensor(function: Callable[[torch.Tensor], torch.Tensor], targets: Targets) -> Targets:
    return each(lambda t: [function(one) for one in t] if isinstance(t, list) else function(t), targets)


def tensors(targets: Targets) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    each_tensor(lambda t: found.append(t) or t, targets)
    return found


def rows(targets: Targets) -> int:
    """Samples."""
    return len(next(iter(targets.values())) if isinstance(targets, dict) else targets)


def joined(parts: Sequence[Targets]) -> Targets:
    """Samples of several batches, in order."""
    return each(lambda *some: sum(some, []) if isinstance(some[0], list) else torch.cat(some), *parts)


def turned_round(targets: Targets) -> Targets:
    """The last sample first."""
    return each(lambda t: t[::-1] if isinstance(t, list) else t.flip(0), targets)


def widened(numbers: torch.Tensor) -> torch.Tensor:
    """Whole numbers in 64 bits, for numpy's come in all widths."""
    return numbers if numbers.is_floating_point() or numbers.dtype == torch.bool else numbers.long()


def one_or_all(by_name: dict[str, Target]) -> Targets:
    return by_name if len(by_name) > 1 else next(iter(by_name.values()))
