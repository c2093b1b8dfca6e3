"""The table of `bench rates`."""

from __future__ import annotations


def show(result: dict) -> str:
    """The table, in Markdown."""
    rounds = len(result["rates"]["synthetic"]["values"])
    lines = [f"| {result['data']} | images/s, median of {rounds} | lowest - highest |", "|---|---:|---:|"]
    for what, r in result["rates"].items():
        lines.append(f"| {what} | {r['images_per_s']:.0f} | {r['lowest']:.0f} - {r['highest']:.0f} |")
    ratio = result["end_to_end_over_synthetic"]
    return "\n".join([*lines, "", f"end-to-end / synthetic: {ratio:.3f} ({result['ranks']} ranks, {result['device']})"])
