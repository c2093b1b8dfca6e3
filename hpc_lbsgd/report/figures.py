"""Figures that are files: made without a display and without matplotlib's global state."""

from __future__ import annotations

from pathlib import Path

DPI = 110


def panels(columns: int, size: tuple[float, float]):
    """(figure, list of axes side by side); size in inches. Loads matplotlib, which takes a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure, path: Path) -> None:
    """Write the figure in the format that the path's suffix names."""
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
