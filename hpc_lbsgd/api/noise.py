"""The gradient's noise scale over the last measured steps (McCandlish et al. 2018)."""

from __future__ import annotations

from collections import deque

from hpc_lbsgd.api.verdict import Verdict
from hpc_lbsgd.theory import noise


class NoiseScale:
    """Collects what a schedule with `measure_every` measures; `value()` is B_simple with its 95 % interval.

    last: how many measurements count, for the scale grows while a model learns.
    """

    def __init__(self, last: int = 50):
        self.measurements: deque[noise.Measurement] = deque(maxlen=last)

    def add(self, verdict: Verdict) -> None:
        """Of every step; those without a measurement change nothing."""
        if verdict.measurement is not None:
            self.measurements.append(verdict.measurement)

    def value(self) -> noise.NoiseScale | None:
        """(value, low, high) in samples; None before the second measurement. See `theory.noise.NoiseScale`."""
        return noise.noise_scale(list(self.measurements))
