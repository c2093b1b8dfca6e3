"""What rounds say together. Each round is measured next to its neighbours in time, so that ratios are taken inside a
round: what slows the machine down for a while meets both sides."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

SPREAD_ROUNDS = 3  # with fewer there is no spread to speak of
FEWEST_ROUNDS = 5  # with fewer, reports say that nothing should be concluded


def spread(name: str, values: Iterable[float]) -> dict[str, float]:
    """A row's columns for one measurement: the median over rounds, the lowest and the highest."""
    values = list(values)
    return {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def by_round(ours: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """Ours over theirs, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
