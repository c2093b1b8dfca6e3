"""The table of `bench checkpoint`."""

from __future__ import annotations


def show(result: dict) -> str:
    """The table, in Markdown."""
    lines = [
        f"| recipe | written | MB | stall, ms: median of {result['rounds']} | lowest - highest | write, ms "
        "| lowest - highest |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in result["rows"]:
        stall, write = ([1e3 * r[f"{what}_s{end}"] for end in ("", "_low", "_high")] for what in ("stall", "write"))
        lines.append(
            f"| {r['recipe']} | {r['way']} | {r['bytes'] / 1e6:.1f} | {stall[0]:.1f} | {stall[1]:.1f} - {stall[2]:.1f} "
            f"| {write[0]:.0f} | {write[1]:.0f} - {write[2]:.0f} |"
        )
    return "\n".join(lines)
