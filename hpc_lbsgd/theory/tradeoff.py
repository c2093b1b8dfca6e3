"""Steps against examples (McCandlish et al. 2018, section 2.3). Pure; numpy only.

To reach a given loss with a batch of B takes S steps and E = S*B examples, with
(S/S_min - 1) * (E/E_min - 1) = 1 (eq. 2.11); B_crit = E_min/S_min (eq. 2.12).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[np.float64]


class Tradeoff(NamedTuple):
    """The frontier: fewest steps (at any batch) and fewest examples (at a batch of one)."""

    min_steps: float
    min_examples: float

    @property
    def critical_batch(self) -> float:
        """B_crit: twice the fewest steps, twice the fewest examples (eq. 2.12)."""
        return self.min_examples / self.min_steps

    def steps(self, batch: float) -> float:
        """S = S_min * (1 + B_crit/B)."""
        return self.min_steps * (1 + self.critical_batch / batch)

    def examples(self, batch: float) -> float:
        """E = E_min * (1 + B/B_crit)."""
        return self.min_examples * (1 + batch / self.critical_batch)


def fit(batches: Numbers, steps: Numbers) -> Tradeoff:
    """The frontier through runs that reached one loss: S = S_min + E_min/B, by least squares of relative errors.

    Raises ValueError for fewer than two batches, or where no frontier fits (steps that grow with the batch).
    """
    b, s = np.asarray(batches, np.float64), np.asarray(steps, np.float64)
    if len(set(b.tolist())) < 2:
        raise ValueError("a frontier needs runs at two batches or more")
    design = np.stack([np.ones_like(b), 1 / b], axis=1) / s[:, None]
    (min_steps, min_examples), *_ = np.linalg.lstsq(design, np.ones_like(s), rcond=None)
    if min_steps <= 0 or min_examples <= 0:
        raise ValueError(
            f"no frontier fits: S_min = {min_steps:.3g}, E_min = {min_examples:.3g}; the batches are all on "
            "one side of the critical batch, or the learning rates are not tuned"
        )
    return Tradeoff(float(min_steps), float(min_examples))


def fit_interval(batches: Numbers, steps: Numbers, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """90 % interval of B_crit by bootstrap over the runs; (low, high), high may be infinite."""
    rng = np.random.default_rng(seed)
    b, s = np.asarray(batches, np.float64), np.asarray(steps, np.float64)
    found = []
    for _ in range(draws):
        chosen = rng.integers(0, len(b), len(b))
        try:
            found.append(fit(b[chosen], s[chosen]).critical_batch)
        except ValueError:
            found.append(np.inf)
    low, high = np.quantile(found, [0.05, 0.95], method="nearest")
    return float(low), float(high)
