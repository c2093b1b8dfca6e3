"""How `bench loader` shows its result: a table, and bars with their spread."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.report import figures


def show(result: dict) -> str:
    """The table, in Markdown."""
    lines = [
        f"| loader | threads | images/s, median of {result['rounds']} | lowest - highest | first row / this |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['loader']} | {r['threads']} | {r['images_per_s']:.0f} | {r['lowest']:.0f} - {r['highest']:.0f} | "
            f"{r['first_over_this']:.2f} |"
        )
    return "\n".join(lines)


def plot(path: Path, result: dict) -> None:
    """Bars by loader, grouped by threads, with the spread."""
    names = list(dict.fromkeys(r["loader"] for r in result["rows"]))
    threads = list(dict.fromkeys(r["threads"] for r in result["rows"]))
    figure, (axis,) = figures.panels(1, (8, 0.9 + 0.55 * len(names)))
    height = 0.8 / len(threads)
    for i, t in enumerate(threads):
        rows = {r["loader"]: r for r in result["rows"] if r["threads"] == t}
        middle = [rows[n]["images_per_s"] for n in names]
        spread = [
            [m - rows[n]["lowest"] for n, m in zip(names, middle, strict=True)],
            [rows[n]["highest"] - m for n, m in zip(names, middle, strict=True)],
        ]
        axis.barh(
            [k + i * height for k in range(len(names))], middle, height, xerr=spread, label=f"{t} thread{'s' * (t > 1)}"
        )
    axis.set_yticks([k + 0.4 - height / 2 for k in range(len(names))], names)
    axis.invert_yaxis()
    axis.set_xlabel("images a second")
    axis.legend(fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    figures.save(figure, path, result)
