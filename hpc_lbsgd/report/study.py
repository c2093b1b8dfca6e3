"""A scaling study in a report: what `bench scaling` left in its folder. Pure reading, and one figure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.report.curves import Canvas, colour, mark

RESULTS = "results.json"
MODES = {"weak": "a full pass on every rank", "strong": "one global batch"}


@dataclass
class Study:
    name: str
    folder: Path
    result: dict  # as `bench scaling --json` has it

    @property
    def rows(self) -> list[dict]:
        return self.result["rows"]

    @property
    def settings(self) -> str:
        """What was measured, against what."""
        r = self.result
        data = r["data"] or "none (synthetic pictures only)"
        missing = f"; no result on {', '.join(map(str, r['missing_ranks']))} ranks" if r["missing_ranks"] else ""
        return f"{r['recipe']}; {r['machine']}, {r['engine']}; data: {data}; relative to {r['baseline']}{missing}"

    def table(self) -> list[dict]:
        """A row a mode and number of ranks, as text."""
        return [
            {
                "mode": row["mode"],
                "ranks": row["ranks"],
                "nodes": row["nodes"],
                "kn": f"{row['global_batch']:,}",
                "rate": f"{row['images_per_s']:,.0f}",
                "efficiency": f"{row['efficiency']:.1%}",
                "spread": f"{row['efficiency_low']:.1%} – {row['efficiency_high']:.1%}",
                "data": f"{row['data_wait_share']:.1%}",
                "sums": f"{row['exposed_comm_share']:.1%}",
                "slowest": f"{row['slowest_rank']} on {row['slowest_host']}, {row['slowest_over_median']:+.1%}",
                "rounds": row["rounds"],
            }
            for row in self.rows
        ]


def study(name: str) -> Study | None:
    """The study in a folder, None where there is none. Raises RequestError for results that cannot be read."""
    file = Path(name) / RESULTS
    if not file.is_file():
        return None
    try:
        found = Study(file.resolve().parent.name, Path(name), json.loads(file.read_text()))
        found.table(), found.settings  # what is missing shows here
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise RequestError(
            f"{file}: no results of bench scaling ({type(problem).__name__}: {problem}); write them again with: "
            f"hpc-lbsgd bench scaling --report {name}"
        ) from None
    return found


def efficiency(found: Study, ink: str) -> Canvas:
    """Efficiency by ranks, lowest to highest round as bars, and the ideal."""
    canvas = Canvas("ranks", "efficiency, %", ink=ink)
    ranks = sorted({row["ranks"] for row in found.rows})
    canvas.axis.axhline(100, color=ink, linestyle="--", linewidth=1, label="ideal")
    for i, (mode, meaning) in enumerate(MODES.items()):
        rows = [row for row in found.rows if row["mode"] == mode]
        if rows:
            values = [100 * row["efficiency"] for row in rows]
            ends = ([100 * row[f"efficiency_{end}"] for row in rows] for end in ("low", "high"))
            bars = [[abs(v - e) for v, e in zip(values, end, strict=True)] for end in ends]
            canvas.axis.errorbar([row["ranks"] for row in rows], values, bars, color=colour(i), marker=mark(i),
                                 capsize=3, label=f"{mode}: {meaning}")  # fmt: skip
    canvas.axis.set_xscale("log", base=2)
    canvas.axis.set_xticks(ranks, [f"{n:,}" for n in ranks], color=ink)
    canvas.axis.minorticks_off()
    canvas.axis.set_ylim(bottom=0)
    canvas.legend()
    return canvas
