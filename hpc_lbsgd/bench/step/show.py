"""How `bench step` shows its result: a table, and a step's parts as bars."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.bench.core.spread import FEWEST_ROUNDS
from hpc_lbsgd.bench.core.task import PARTS
from hpc_lbsgd.report import figures


def show(result: dict) -> str:
    lines = [f"{result['model']}, {result['image_size']} pixels, {result['rounds']} rounds; milliseconds of a step", ""]
    lines.append(
        f"  {'way':22s} ranks  batch   images/s      low     high     step  forward backward  exposed  optimizer"
    )
    for r in sorted(result["rows"], key=lambda r: (r["batch"], r["way"])):
        lines.append(
            f"  {r['way']:22s} {r['ranks']:5d} {r['batch']:6d} {r['images_per_s']:10.1f} {r['images_per_s_low']:8.1f} "
            f"{r['images_per_s_high']:8.1f} {1e3 * r['step_s']:8.2f} " + " ".join(f"{1e3 * r[p]:8.2f}" for p in PARTS)
        )
    lines += ["", "  hpc_lbsgd over each, a rank: median of the rounds, lowest and highest"]
    lines += [
        f"    batch {r['batch']:5d}  {r['over']:22s} {r['ratio']:6.3f}  {r['ratio_low']:.3f} to {r['ratio_high']:.3f}"
        for r in result["ratios"]
    ]
    if result["rounds"] < FEWEST_ROUNDS:
        lines.append(f"  fewer than {FEWEST_ROUNDS} rounds: conclude nothing")
    return "\n".join(lines)


def plot(path: Path, result: dict) -> None:
    """A step's parts, stacked, a bar a way; one panel a batch size."""
    batches = sorted({r["batch"] for r in result["rows"]})
    figure, axes = figures.panels(len(batches), (5.5 * len(batches), 4.2))
    for axis, batch in zip(axes, batches, strict=True):
        rows = [r for r in result["rows"] if r["batch"] == batch]
        parts = {part.removesuffix("_s"): [1e3 * r[part] for r in rows] for part in PARTS}
        figures.stack(axis, [r["way"] for r in rows], parts)
        axis.set(title=f"batch {batch}", ylabel="milliseconds")
        axis.tick_params(axis="x", labelrotation=40, labelsize=7)
        axis.legend(fontsize=7)
    figures.save(figure, path, result)
