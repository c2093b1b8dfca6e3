"""How `bench simulate` shows what it predicts: tables, and efficiency with the parts of a step drawn."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.bench.simulate.presets import PRESETS, PUBLISHED
from hpc_lbsgd.report import figures
from hpc_lbsgd.theory import simulate as model


def show_titles(titles: dict[str, str]) -> str:
    return "\n".join(f"{name:26s} {title}" for name, title in titles.items())


def show(result: dict) -> str:
    lines = [
        f"{result['preset']}: {result['machine']}",
        f"  efficiency against {result['baseline']}; milliseconds of a step",
        "",
        "    nodes    ranks     step  efficiency     images/s  stragglers  exposed  input  messages",
    ]
    for r in result["rows"]:
        lines.append(
            f"  {r['nodes']:7d} {r['ranks']:8d} {1e3 * r['step_s']:8.1f} {r['efficiency']:11.1%} "
            f"{r['images_per_s']:12.0f} {1e3 * r['straggler_s']:11.1f} {1e3 * r['exposed_comm_s']:8.1f} "
            f"{1e3 * r['input_wait_s']:6.1f} {r['messages']:9d}"
        )
    knee, largest = result["knee"], max(result["rows"], key=lambda r: r["nodes"])
    costs = largest["costs_s"].items()
    lines += [
        "",
        f"  below 90 % from {knee['nodes']} nodes on, set by {knee['set_by']}"
        if knee
        else f"  above 90 % up to {model.MOST_NODES} nodes",
        f"  to hide {result['gradient_bytes'] / 1e6:.0f} MB of gradients behind backward a node needs "
        f"{result['required_gbit_per_s']:.1f} Gbit/s of line rate",
        f"  of a step at {largest['nodes']} nodes, "
        + ", ".join(f"{limit} cost{'' if limit == 'stragglers' else 's'} {1e3 * t:.1f} ms" for limit, t in costs),
        f"  at {result['what_if'][0]['nodes']} nodes, throughput with: "
        + ", ".join(f"{w['change']} {w['gain']:+.1%}" for w in result["what_if"]),
        "",
        "  constants",
    ]
    lines += [f"    {c['name']:20s} {shown(c['value']):>12s}  {c['source']}" for c in result["constants"] if c["value"]]
    return "\n".join(lines)


def shown(value) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else ""


def show_published(result: dict) -> str:
    lines = ["  preset                      nodes  measured  predicted  error, points  fitted to  source"]
    for r in result["rows"]:
        lines.append(
            f"  {r['preset']:26s} {r['nodes']:6d} {r['efficiency']:9.1%} {r['predicted']:10.1%} "
            f"{r['error_points']:+14.1f}  {'yes' if r['used'] else 'no':9s}  {r['source']}"
        )
    return "\n".join(lines)


def plot(path: Path, result: dict) -> None:
    """Efficiency against ranks, and where a step goes."""
    figure, (left, right) = figures.panels(2, (11, 4.2))
    rows, positions = result["rows"], range(len(result["rows"]))
    left.plot([r["ranks"] for r in rows], [100 * r["efficiency"] for r in rows], "o-", label=result["preset"])
    for p in PUBLISHED:
        if result["preset"] == p.preset and not p.samples:
            ranks = p.nodes * PRESETS[p.preset]().system.cluster.ranks_per_node
            left.plot(ranks, 100 * p.efficiency, "kx")
    left.set(xscale="log", xlabel="ranks", ylabel="efficiency, %; x: published", ylim=(0, 105))
    left.legend(fontsize=8)
    parts = {
        "compute (with stragglers)": "compute_s",
        "exposed communication": "exposed_comm_s",
        "input": "input_wait_s",
    }
    figures.stack(right, positions, {label: [1e3 * r[key] for r in rows] for label, key in parts.items()})
    right.set(xlabel="nodes", ylabel=f"step, ms: {result['preset']}")
    right.set_xticks(positions, [str(r["nodes"]) for r in rows], fontsize=8)
    right.legend(fontsize=8, loc="lower left")
    figures.save(figure, path, result)


def show_compared(result: dict) -> str:
    lines = [
        f"{result['model']}, {result['image_size']} pixels, {result['cores']} cores of {result['machine']}, "
        f"{result['threads']} thread{'s' if result['threads'] > 1 else ''} a rank; milliseconds of a step",
        "",
        "  batch  ranks  a core  predicted  measured      low     high    error  efficiency  measured  points  learnt",
    ]
    for r in result["rows"]:
        lines.append(
            f"  {r['batch']:5d} {r['ranks']:6d} {r['ranks_per_core']:7.3g} {1e3 * r['step_s']:10.2f} "
            f"{1e3 * r['measured_step_s']:9.2f} {1e3 * r['measured_step_s_low']:8.2f} "
            f"{1e3 * r['measured_step_s_high']:8.2f} {r['error']:+8.1%} {r['efficiency']:11.1%} "
            f"{r['measured_efficiency']:9.1%} {r['error_points']:+7.1f}  {'yes' if r['calibrated'] else 'no'}"
        )
    lines += ["", "  learnt from the calibrating runs"]
    lines += [
        f"    batch {c['batch']}: forward {1e3 * c['forward_s']:.2f} ms, backward {1e3 * c['backward_s']:.2f} ms, "
        f"other {1e3 * c['other_s']:.2f} ms; beside others computing takes {c['crowding']:.3f} times as long; "
        f"{c['usable_gbyte_per_s']:.3g} GB/s"
        for c in result["constants"]
    ]
    return "\n".join(lines)
