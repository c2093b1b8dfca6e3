"""BatchNorm of several equal groups at once, for torch's compiler."""

from __future__ import annotations

import torch


def batch_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`F.batch_norm` on each of `groups` groups of samples, which lie one after the other: one reduction over
    (G, n, C, ...) where G calls read and write parts of one tensor, and put them together again.

    x: (G n, C, ...). Returns the outputs and (G, 2 C): each group's means, and unbiased variances (at least float32).
    Compiled, it reads and writes as often as one call; in eager torch each line is a pass over memory.
    """
    wide = x.unflatten(0, (groups, -1))
    wide = wide.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, [1, *range(3, wide.dim())], correction=0, keepdim=True)
    count = x.numel() // (groups * x.shape[1])
    measured = torch.cat([mean.detach(), variance.detach() * (count / (count - 1))], 2).view(groups, -1)
    y, each = (wide - mean) * torch.rsqrt(variance + eps), [-1, *[1] * (x.dim() - 2)]
    if weight is not None:
        y = y * weight.view(each)
    if bias is not None:
        y = y + bias.view(each)
    return y.flatten(0, 1).to(x.dtype), measured
