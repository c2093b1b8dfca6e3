"""The noise scale of the gradient, and what it says about batches (McCandlish et al. 2018). Pure; numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Measurement(NamedTuple):
    """One step's unbiased estimates of tr(Sigma) and |G|^2. The second can be negative."""

    trace: float
    square: float


def measure(small_square: float, big_square: float, small_batch: int, big_batch: int) -> Measurement:
    """tr(Sigma) and |G|^2 from squared gradient norms at two batch sizes (McCandlish et al. 2018, appendix A.1).

    small_square: mean over the workers of |g_j|^2, each from `small_batch` samples before the sum over ranks;
    big_square: |g|^2 of their mean, from `big_batch` samples. E|g_B|^2 = |G|^2 + tr(Sigma)/B.
    """
    square = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)
    trace = (small_square - big_square) / (1 / small_batch - 1 / big_batch)
    return Measurement(trace, square)


class NoiseScale(NamedTuple):
    """B_simple = tr(Sigma) / |G|^2 (eq. 2.9), with a 95 % interval.

    `high` is None (unbounded) where |G|^2 cannot be told from zero, and `value` too where its estimate is negative: the
    batches measured are then far below the noise scale, and `low` is all that is known.
    """

    value: float | None
    low: float
    high: float | None


def noise_scale(measurements: Sequence[Measurement]) -> NoiseScale | None:
    """The ratio of the averages, never the average of ratios: trace and square are averaged apart first.

    The interval is Fieller's for a ratio of means: exact where the denominator may be near zero, where the delta
    method would promise too much. None for fewer than two measurements.
    """
    if len(measurements) < 2:
        return None
    values = np.asarray(measurements, np.float64)
    count = len(values)
    trace, square = values.mean(axis=0).tolist()
    trace = max(trace, 0.0)  # it is a variance: less is rounding
    (vt, c), (_, vs) = (np.cov(values, rowvar=False) / count).tolist()
    t2 = student95(count - 1) ** 2
    # the set of x with (trace - x*square)^2 <= t^2 * (vt - 2xc + x^2*vs), that is a*x^2 - 2b*x + d <= 0
    a, b, d = square * square - t2 * vs, trace * square - t2 * c, trace * trace - t2 * vt
    root = math.sqrt(max(b * b - a * d, 0.0))
    if square > 0 and a > 0:
        return NoiseScale(trace / square, max((b - root) / a, 0.0), (b + root) / a)
    # |G|^2 is not significantly above zero: the set reaches to infinity, and starts at its only positive root
    roots = sorted(((b - root) / a, (b + root) / a)) if a else [0.0, d / (2 * b) if b else 0.0]
    return NoiseScale(trace / square if square > 0 else None, roots[1] if roots[0] <= 0 < roots[1] else 0.0, None)


def student95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: exact for 1 and 2 degrees of freedom, then Fisher's expansion of the
    normal quantile (error below 1 %)."""
    if freedom <= 2:
        return (12.706, 4.303)[freedom - 1]
    z, n = 1.959963984540054, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    more: float = sum(term / n**power for power, term in enumerate(terms, start=1))
    return z + more


def transferred_lr(lr: float, batch: int, new_batch: int, noise: float) -> float:
    """The learning rate for another batch: eps(B) = eps_max / (1 + B_noise/B) (eq. 2.6).

    Linear scaling is the limit B << B_noise; far above it the learning rate stops growing.
    """
    return lr * (1 + noise / batch) / (1 + noise / new_batch)


def adaptive_batch(noise: float, factor: float) -> float:
    """B = sqrt(r * B_simple) (eq. D.6)."""
    return math.sqrt(factor * noise)
