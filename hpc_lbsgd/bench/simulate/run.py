"""What more nodes would do, before anyone pays for them: a preset with changes, and its predictions."""

from __future__ import annotations

from dataclasses import replace

from hpc_lbsgd.bench.simulate import presets
from hpc_lbsgd.bench.simulate.presets import MB, PRESETS, PUBLISHED, Preset
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory import simulate as model
from hpc_lbsgd.theory.simulate import System

NODES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
METRIC = "step time (s) and weak-scaling efficiency, predicted"


def choose(preset: str, run: str | None = None, **changes) -> Preset:
    """A preset, with a measured run's numbers in it, and with single fields changed.

    changes: ranks_per_node, network_gbit, input_images_per_s (a node), cores, wire (int64, int32, fp32, fp16),
    algorithm, bucket_mb; None leaves the preset's.
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
            method = replace(method, item_bytes={"int64": 8, "int32": 4, "fp32": 4, "fp16": 2}[value])
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


def against_published() -> dict:
    """Predictions beside what was measured; `used` says which of them the two fitted numbers have seen."""
    rows = []
    for p in PUBLISHED:
        system = PRESETS[p.preset]().system
        there = presets.of_batch(system, p.samples, p.images_per_s) if p.samples else system
        longer = model.step(there, p.nodes).step_s / model.baseline_step_s(system, p.baseline_ranks)
        predicted = there.workload.samples / system.workload.samples / longer
        rows.append({**p._asdict(), "predicted": predicted, "error_points": 100 * (predicted - p.efficiency)})
    return {"metric": METRIC, "rows": rows}
