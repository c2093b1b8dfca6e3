"""`bench simulate`: what more nodes would do, before anyone pays for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hpc_lbsgd.bench.simulate import calibrate as measured
from hpc_lbsgd.bench.simulate import presets
from hpc_lbsgd.bench.simulate.presets import MB, PRESETS, PUBLISHED, Preset
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.report import figures
from hpc_lbsgd.theory import simulate as model
from hpc_lbsgd.theory.simulate import System

NODES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
METRIC = "step time (s) and weak-scaling efficiency, predicted"


def choose(preset: str, run: str | None = None, **changes) -> Preset:
    """A preset, with a measured run's numbers in it, and with single fields changed.

    changes: ranks_per_node, network_gbit, input_images_per_s (a node), cores, wire (fp32, fp16), algorithm,
    bucket_mb; None leaves the preset's.
    """
    if preset not in PRESETS:
        raise RequestError(f"preset {preset}: allowed are {', '.join(PRESETS)}")
    chosen = PRESETS[preset]()
    if run:
        from hpc_lbsgd.bench.simulate.from_run import calibrated

        system, found = calibrated(chosen.system, run)
        source = f"measured: {run}, {found.steps} steps on {found.ranks} ranks"
        fields = ["forward_s", "backward_s", "other_s", "ranks_per_node"]
        fields += ["inter", "intra"] if found.ranks > 1 else []
        sources = chosen.sources | {field: source for field in fields}
        chosen = Preset(system, found.ranks_per_node, f"{run} on {chosen.title}", sources)
    given = {key: value for key, value in changes.items() if value is not None}
    return chosen._replace(system=changed(chosen.system, given), sources=chosen.sources | {k: "given" for k in given})


def changed(system: System, given: dict) -> System:
    cluster, method = system.cluster, system.method
    for key, value in given.items():
        if key == "network_gbit":
            cluster = replace(cluster, inter=value * presets.GBIT)
        elif key == "input_images_per_s":
            cluster = replace(cluster, images_per_s=value)
        elif key in ("ranks_per_node", "cores"):
            cluster = replace(cluster, **{key: value})
        elif key == "wire":
            method = replace(method, item_bytes={"fp32": 4, "fp16": 2}[value])
        elif key == "bucket_mb":
            method = replace(method, bucket_bytes=value * MB, first_bucket_bytes=min(value, 1.0) * MB, fusion_bytes=0)
        elif key == "algorithm":
            method = replace(method, algorithm=value)
    return replace(system, cluster=cluster, method=method)


def predict(name: str, chosen: Preset, nodes: list[int], baseline_ranks: int | None = None) -> dict:
    """Everything that the command reports: rows by number of nodes, the knee, and what changes would buy."""
    system, g = chosen.system, chosen.system.cluster.ranks_per_node
    baseline = baseline_ranks or min(chosen.baseline_ranks, g)
    try:
        reference = model.baseline_step_s(system, baseline)
    except ValueError as problem:
        raise RequestError(f"--baseline {baseline}: {problem}") from None
    said = f"{baseline} rank{'s' if baseline > 1 else ''}"
    fitted = {"straggler": system.fitted.straggler, "protocol_efficiency": system.fitted.protocol_efficiency}
    rows = []
    for n in nodes:
        outcome = model.step(system, n)
        rows.append(
            {
                "nodes": n,
                "ranks": n * g,
                "efficiency": reference / outcome.step_s,
                "efficiency_baseline": said,
                "images_per_s": n * g * system.workload.samples / outcome.step_s,
                "fitted": fitted,
                **outcome._asdict(),
                "costs_s": model.costs(system, n),
            }
        )
    largest = max(nodes)
    now = model.step(system, largest).step_s
    knee = model.knee(system, baseline)
    return {
        "metric": METRIC,
        "baseline": said,
        "machine": chosen.title,
        "preset": name,
        "rows": rows,
        "knee": {"nodes": knee[0], "set_by": knee[1]} if knee else None,
        "what_if": [
            {
                "change": change,
                "nodes": largest,
                "step_s": (s := model.step(other, largest).step_s),
                "gain": now / s - 1,
            }
            for change, other in model.what_if(system).items()
        ],
        "gradient_bytes": system.workload.parameters * system.method.item_bytes,
        "required_gbit_per_s": model.required_gbit_per_s(system),
        "constants": constants(chosen),
    }


def constants(chosen: Preset) -> list[dict]:
    """Every number of the model, with where it comes from."""
    w, c, m, f = (getattr(chosen.system, part) for part in ("workload", "cluster", "method", "fitted"))
    given = chosen.sources.get
    fit = f"fitted, once for all presets, to {sum(p.used for p in PUBLISHED)} published efficiencies"
    table = {
        "parameters": (w.parameters, "the model's layers"),
        "samples": (w.samples, "title"),
        **{k: (getattr(w, k), given(k, "none")) for k in ("forward_s", "backward_s", "other_s")},
        "ranks_per_node": (c.ranks_per_node, given("ranks_per_node", "title")),
        "inter_gbit_per_s": (c.inter / presets.GBIT, given("network_gbit", given("inter"))),
        "intra_gbyte_per_s": (c.intra / presets.GB, given("intra")),
        "protocols": ([list(p) for p in c.protocols], given("protocols")),
        "method": ({k: v for k, v in vars(m).items()}, given("method")),
        "straggler": (f.straggler, fit),
        "protocol_efficiency": (f.protocol_efficiency, fit),
    }
    return [{"name": name, "value": value, "source": source} for name, (value, source) in table.items()]


def against_published() -> list[dict]:
    """Predictions beside what was measured; `used` says which of them the two fitted numbers have seen."""
    rows = []
    for p in PUBLISHED:
        predicted = model.efficiency(PRESETS[p.preset]().system, p.nodes, p.baseline_ranks)
        rows.append({**p._asdict(), "predicted": predicted, "error_points": 100 * (predicted - p.efficiency)})
    return rows


# ---------------------------------------------------------------- showing


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


def show_published(rows: list[dict]) -> str:
    lines = ["  preset                      nodes  measured  predicted  error, points  fitted to  source"]
    for r in rows:
        lines.append(
            f"  {r['preset']:26s} {r['nodes']:6d} {r['efficiency']:9.1%} {r['predicted']:10.1%} "
            f"{r['error_points']:+14.1f}  {'yes' if r['used'] else 'no':9s}  {r['source']}"
        )
    return "\n".join(lines)


def plot(path: Path, results: list[dict]) -> None:
    """Efficiency against nodes, and where the last one's step goes."""
    figure, (left, right) = figures.panels(2, (11, 4.2))
    for result in results:
        rows = result["rows"]
        left.plot([r["ranks"] for r in rows], [100 * r["efficiency"] for r in rows], "o-", label=result["preset"])
    for p in PUBLISHED:
        if any(r["preset"] == p.preset for r in results):
            ranks = p.nodes * PRESETS[p.preset]().system.cluster.ranks_per_node
            left.plot(ranks, 100 * p.efficiency, "kx")
    left.set(xscale="log", xlabel="ranks", ylabel="efficiency, %; x: published", ylim=(0, 105))
    left.legend(fontsize=8)
    rows, bottom = results[0]["rows"], [0.0] * len(results[0]["rows"])
    positions = range(len(rows))
    for key, label in (
        ("compute_s", "compute (with stragglers)"),
        ("exposed_comm_s", "exposed communication"),
        ("input_wait_s", "input"),
    ):
        heights = [1e3 * r[key] for r in rows]
        right.bar(positions, heights, bottom=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    right.set(xlabel="nodes", ylabel=f"step, ms: {results[0]['preset']}")
    right.set_xticks(positions, [str(r["nodes"]) for r in rows], fontsize=8)
    right.legend(fontsize=8, loc="lower left")
    figures.save(figure, path)


def simulate(
    preset: str,
    run: str | None,
    nodes: list[int] | None,
    baseline: int | None,
    changes: dict,
    published: bool,
    calibrate: list[Path] | None,
    against: list[Path] | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """The command: predict, print, and draw where asked to."""
    if calibrate or against:
        compared = measured.compare(calibrate, against)
        print(json.dumps(compared) if as_json else measured.show(compared))
        return
    if published:
        rows = against_published()
        print(json.dumps({"metric": METRIC, "rows": rows}) if as_json else show_published(rows))
        return
    result = predict(preset, choose(preset, run, **changes), nodes or NODES, baseline)
    print(json.dumps(finite(result)) if as_json else show(result))
    if picture:
        plot(picture, [result])


def finite(value):
    """JSON knows no infinity: None in its place."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
