"""BatchNorm of several equal groups at once, for torch's compiler."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def batch_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`F.batch_norm` on each of `groups` groups of samples, which lie one after the other: one reduction over
    (G, n, C, ...) where G calls read and write parts of one tensor, and put them together again.

    x: (G n, C, ...). Returns the outputs and (G, 2 C): each group's means, and unbiased variances (at least float32).
    Compiled, it reads and writes as often as one call; in eager torch each line is a pass over memory.
    """
    y, mean, variance = _Groups.apply(x, groups, weight, bias, eps)
    count = x.numel() // mean.numel()
    return y, torch.cat([mean.detach(), variance.detach() * (count / (count - 1))], 2).view(groups, -1)


class _Groups(torch.autograd.Function):
    """Its backward by hand, from what the layer before has kept: from the forward's lines torch's compiler would keep
    each difference from a mean, in float32."""

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps):
        wide, dims, each = _wide(x, groups)
        variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.groups, ctx.biased = groups, bias is not None
        y = (wide - mean) * scale
        y = y if weight is None else y * weight.view(each)
        y = y if bias is None else y + bias.view(each)
        # copied: where no type changes it would be a view, which no activation may write into
        return y.flatten(0, 1).to(x.dtype, copy=True), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _mean, _variance):
        x, weight, mean, scale = ctx.saved_tensors
        wide, dims, each = _wide(x, ctx.groups)
        normal, above = (wide - mean) * scale, _wide(upstream, ctx.groups)[0]
        total, along, count = above.sum(dims, True), (above * normal).sum(dims, True), x.numel() // mean.numel()
        down = (above - (total + normal * along) / count) * scale
        down = down if weight is None else down * weight.view(each)
        to_weight = None if weight is None else along.sum(0).flatten().to(weight.dtype)
        to_bias = total.sum(0).flatten().to(mean.dtype) if ctx.biased else None
        return down.flatten(0, 1).to(x.dtype), None, to_weight, to_bias, None


def _wide(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """x as (G, n, C, ...) in at least float32; its dimensions within a group; the shape of one value a channel."""
    wide = x.unflatten(0, (groups, -1))
    dims = [1, *range(3, wide.dim())]
    return wide.to(torch.promote_types(x.dtype, torch.float32)), dims, [-1, *[1] * (x.dim() - 2)]
