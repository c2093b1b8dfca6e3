"""What a search says: a table, a sentence, and the file that recipes include."""

from __future__ import annotations

from hpc_lbsgd import yaml12
from hpc_lbsgd.bench.core.spread import SPREAD_ROUNDS
from hpc_lbsgd.bench.step.tune.search import CONFIRMATION, said

WIRE = "wire fp16"  # the group of the wire, which is timed and never tuned


def show(result: dict) -> str:
    lines = [
        f"{result['model']}, {result['image_size']} pixels, {result['ranks']} ranks of {result['threads']} threads; "
        "milliseconds of a step; ratio: times as fast as the best before it",
        "",
        f"  {'group':13s} {'setting':46s} batch     step      low     high  rounds   ratio  low to high",
    ]
    for r in result["rows"]:
        lines.append(
            f"  {r['group']:13s} {said(r['setting']):46s} {r['batch']:5d} {1e3 * r['step_s']:8.2f} "
            f"{1e3 * r['step_s_low']:8.2f} {1e3 * r['step_s_high']:8.2f} {r['rounds']:7d} {r['ratio']:7.3f}  "
            f"{r['ratio_low']:.3f} to {r['ratio_high']:.3f}{'  wins' if r['wins'] else ''}"
        )
    lines += ["", f"  {conclusion(result)}"]
    if any(r["group"] == WIRE for r in result["rows"]):
        lines.append("  the fp16 wire changes results, so it is not in the file: wire: fp16 is for the recipe to say")
    file = result["file"]
    lines.append(f"  written to {file}: take it with `machine: {file}` in a recipe, or --set machine={file}")
    return "\n".join(lines)


def conclusion(result: dict) -> str:
    """One sentence: what holds from here on, and why."""
    if result["tuned"]:
        final = next(r for r in result["rows"] if r["group"] == CONFIRMATION and r["setting"])
        return (
            f"{said(result['tuned'])}: {final['ratio']:.3f} times as fast as the defaults "
            f"({final['ratio_low']:.3f} to {final['ratio_high']:.3f} in {final['rounds']} rounds)"
        )
    few = f"; fewer than {SPREAD_ROUNDS} rounds, so nothing could win" if result["rounds"] < SPREAD_ROUNDS else ""
    return f"the defaults stay: no setting was faster by more than the spread between rounds{few}"


def to_yaml(result: dict) -> str:
    """A file for a recipe's `machine: FILE` or `--set machine=FILE`."""
    batches = sorted({r["batch"] for r in result["rows"]})
    head = [
        "hpc-lbsgd bench step --tune: " + conclusion(result),
        f"{result['model']}, {result['image_size']} pixels, {result['precision']}, batch "
        f"{', '.join(map(str, batches))} a rank, {result['ranks']} ranks; holds for this machine, model and batch",
    ]
    section = yaml12.dump({"machine": result["tuned"]})
    return "".join(f"# {line}\n" for line in head) + section
