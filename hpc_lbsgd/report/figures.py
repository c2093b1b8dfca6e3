"""Figures that are files: made without a display and without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

DPI = 110


def panels(columns: int, size: tuple[float, float]):
    """(figure, list of axes side by side); size in inches. Loads matplotlib, which takes a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def stack(axis, positions: Sequence, parts: Mapping[str, Sequence[float]]) -> None:
    """A bar at each position, made of parts: heights by label, from the bottom up."""
    bottom = [0.0] * len(positions)
    for label, heights in parts.items():
        axis.bar(positions, heights, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]


def save(figure, path: Path) -> None:
    """Write the figure in the format that the path's suffix names."""
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
