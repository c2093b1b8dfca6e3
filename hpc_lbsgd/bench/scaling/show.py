"""What `bench scaling` shows: a table, a plot, and a line a row for scripts."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_lbsgd.bench.core.spread import FEWEST_ROUNDS
from hpc_lbsgd.bench.scaling.results import Folder, summarise
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.origin import origin
from hpc_lbsgd.records import write_atomically
from hpc_lbsgd.report import figures


def report(path: Path, baseline: int | None) -> dict:
    """Write results.json, table and plot from the launches that the folder has; returns the results."""
    folder = Folder(path)
    request = folder.request()
    if request is None:
        raise RequestError(f"--report {path}: no scaling benchmark there (no {folder.request_file.name})")
    result = origin() | summarise(request, folder.launches(), baseline)
    write_atomically(folder.results, json.dumps(result, indent=1) + "\n")
    write_atomically(folder.table, table(result) + "\n")
    plot(folder.plot, result)
    return result


def show(result: dict) -> str:
    """The table, then the lines for scripts."""
    return "\n".join([table(result), "", *lines(result)])


def lines(result: dict) -> list[str]:
    """For ReFrame and its like: one line a row, key=value."""
    return [
        f"scaling: mode={r['mode']} ranks={r['ranks']} nodes={r['nodes']} images_per_s={r['images_per_s']:.1f} "
        f"efficiency={r['efficiency']:.4f} baseline_ranks={result['baseline_ranks']}"
        for r in result["rows"]
    ]


def table(result: dict) -> str:
    """Markdown: what was measured against what, and one table a mode."""
    data = result["data"] or "none: synthetic pictures only, loader and end-to-end were not measured"
    parts = [
        f"Recipe {result['recipe']}; {result['machine']}, {result['engine']}; threads of a rank: "
        f"{', '.join(map(str, result['threads']))}. Data: {data}.",
        f"Efficiency is relative to {result['baseline']}.",
    ]
    for mode, meaning in (("weak", "a full pass on every rank"), ("strong", "one global batch")):
        rows = [r for r in result["rows"] if r["mode"] == mode]
        if rows:
            parts.append("\n".join([f"**{mode.capitalize()} scaling**: {meaning}.", "", *table_of(rows)]))
    if result["missing_ranks"]:
        parts.append(f"**Missing**: no result on {', '.join(map(str, result['missing_ranks']))} ranks.")
    if any(r["rounds"] < FEWEST_ROUNDS for r in result["rows"]):
        parts.append(f"Fewer than {FEWEST_ROUNDS} rounds: conclude nothing.")
    return "\n\n".join(parts)


def table_of(rows: list[dict]) -> list[str]:
    rates = list(rows[0]["rates"])
    head = ["ranks", "nodes", "kn", *(f"{what}, images/s" for what in rates), "efficiency", "lowest - highest"]
    head += ["step p50, ms", "p90", "p99", "waits for data", "for sums", "slowest rank"]
    found = [f"| {' | '.join(head)} |", "|" + "---:|" * (len(head) - 1) + "---|"]
    for r in rows:
        cells = [r["ranks"], r["nodes"], r["global_batch"], *(f"{r['rates'].get(what, 0):.1f}" for what in rates)]
        cells += [f"{r['efficiency']:.3f}", f"{r['efficiency_low']:.3f} - {r['efficiency_high']:.3f}"]
        cells += [f"{1e3 * r[f'step_s_p{p}']:.1f}" for p in (50, 90, 99)]
        cells += [f"{r['data_wait_share']:.1%}", f"{r['exposed_comm_share']:.1%}"]
        cells += [f"{r['slowest_rank']} on {r['slowest_host']}, {r['slowest_over_median']:+.1%}"]
        found.append(f"| {' | '.join(map(str, cells))} |")
    return found


def plot(path: Path, result: dict) -> None:
    """Images/s beside what the baseline would give without loss, and efficiency with its spread."""
    figure, (rate, share) = figures.panels(2, (10, 4.2))
    for mode, color in (("weak", "C0"), ("strong", "C1")):
        rows = [r for r in result["rows"] if r["mode"] == mode]
        if not rows:
            continue
        style = {"marker": "o", "color": color}
        ranks = [r["ranks"] for r in rows]
        base = next(r for r in rows if r["ranks"] == result["baseline_ranks"])
        rate.plot(ranks, [r["images_per_s"] for r in rows], label=mode, **style)
        rate.plot(ranks, [base["images_per_s"] / base["ranks"] * n for n in ranks], ":", color=color, linewidth=1)
        middle = [r["efficiency"] for r in rows]
        low, high = ([r[f"efficiency_{end}"] for r in rows] for end in ("low", "high"))
        share.plot(ranks, middle, label=mode, **style)
        share.fill_between(ranks, low, high, color=color, alpha=0.2, linewidth=0)
        if "end_to_end_efficiency" in rows[0]:
            ends = [r["end_to_end_efficiency"] for r in rows]
            share.plot(ranks, ends, linestyle="--", label=f"{mode}, end-to-end", **style | {"marker": "."})
    ranks = sorted({r["ranks"] for r in result["rows"]})
    for axis in (rate, share):
        axis.set(xscale="log", xlabel="ranks")
        axis.set_xticks(ranks, [str(n) for n in ranks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    rate.set(yscale="log", ylabel="images/s (dotted: without loss)")
    share.set(ylabel=f"efficiency against {result['baseline_ranks']} rank{'s' * (result['baseline_ranks'] > 1)}")
    share.set_ylim(0, max(1.05, 1.05 * share.dataLim.y1))
    figures.save(figure, path, result)
