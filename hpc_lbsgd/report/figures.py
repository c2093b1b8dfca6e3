"""Figures that are files: made without a display and without matplotlib's global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_lbsgd import origin

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


def save(figure, path: Path, result: Mapping) -> None:
    """Write the figure in the format that the path's suffix names; under it where its result comes from."""
    lines = textwrap.wrap(origin.said(result), int(20 * figure.get_figwidth()), break_on_hyphens=False)
    low = (0.12 * len(lines) + 0.05) / figure.get_figheight() if lines else 0.0
    figure.tight_layout(rect=(0, low, 1, 1))
    figure.text(0.01, 0.01, "\n".join(lines).replace("$", r"\$"), fontsize=6, alpha=0.7, va="bottom")
    figure.savefig(path, dpi=DPI)
