"""`compare A B`: the first step at which two runs differ, in what, and what was different before it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hpc_lbsgd import yaml12
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import flatten
from hpc_lbsgd.records import RunFolder, read_metrics, whole

SAME = ("loss", "lr", "momentum", "global_batch", "samples", "noise_scale", "skipped")  # of a step, in both to the bit
FACTS = ("engine", "ranks", "device")  # of a start


def compare(a: str, b: str) -> dict:
    """{recipe: {key: [a, b]}, start: {key: [a, b]}, first_difference: {step, what: {key: [a, b]}} or null, steps:
    [a, b], shared_steps, evaluations: [{step, a, b}], weights: [{step, equal}]}.

    Records are compared exactly: under `determinism: any-ranks` runs of one recipe differ in nothing.
    """
    folders = [RunFolder(a), RunFolder(b)]
    for folder in folders:
        if not folder.exists():
            raise RequestError(f"{folder.path}: no run (no recipe.yaml in it)")
    records = [list(filter(whole, read_metrics(folder.metrics))) for folder in folders]
    steps = [{r["step"]: r for r in found if r["kind"] == "step"} for found in records]
    return {
        "runs": [a, b],
        "recipe": different(*(flatten(yaml12.mapping_of(f.recipe, str(f.recipe))) for f in folders)),
        "start": different(*(facts_of(f, found) for f, found in zip(folders, records, strict=True))),
        "steps": [len(found) for found in steps],
        "shared_steps": len(steps[0].keys() & steps[1].keys()),
        "first_difference": first_difference(*steps),
        "evaluations": evaluations(*records),
        "weights": weights(*folders),
    }


def different(a: dict, b: dict) -> dict[str, list]:
    return {key: [a.get(key), b.get(key)] for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def facts_of(folder: RunFolder, records: list[dict]) -> dict:
    """What a run's last start ran on."""
    starts = [r for r in records if r["kind"] == "start"]
    facts = {key: starts[-1].get(key) for key in FACTS} if starts else {}
    environments = folder.starts()
    if environments:
        facts |= {f"version of {name}": version for name, version in environments[-1].get("versions", {}).items()}
        facts["git_commit"] = environments[-1].get("git_commit")
    return facts


def first_difference(a: dict[int, dict], b: dict[int, dict]) -> dict | None:
    """The first step that both have and that is not the same in both."""
    for step in sorted(a.keys() & b.keys()):
        what = different(*({key: r.get(key) for key in SAME} for r in (a[step], b[step])))
        if what:
            return {"step": step, "what": what}
    return None


def evaluations(a: list[dict], b: list[dict]) -> list[dict]:
    """Accuracies (else losses) by steps done, where either evaluated."""
    found = []
    for records in (a, b):
        evals = {r["step"]: r for r in records if r["kind"] == "eval"}
        found.append({s: r["loss"] if r.get("accuracy") is None else r["accuracy"] for s, r in evals.items()})
    return [{"step": s, "a": found[0].get(s), "b": found[1].get(s)} for s in sorted(found[0].keys() | found[1].keys())]


def weights(a: RunFolder, b: RunFolder) -> list[dict]:
    """Whether the weights are equal, at each checkpoint that both have."""
    digests = [dict(digests_of(folder)) for folder in (a, b)]
    return [{"step": s, "equal": digests[0][s] == digests[1][s]} for s in sorted(digests[0].keys() & digests[1].keys())]


def digests_of(folder: RunFolder) -> Iterator[tuple[int, str]]:
    for state in folder.checkpoints.glob("step-*/state.json"):
        try:
            content = json.loads(Path(state).read_text())
            yield content["step"], content["weights_sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue


def show(found: dict) -> str:
    """For people."""
    a, b = found["runs"]
    lines = [f"A  {a}", f"B  {b}"]
    for title, key in (("recipe", "recipe"), ("last start", "start")):
        if found[key]:
            lines.append(f"{title}:")
            lines += [f"  {name:32s} {said(x)}  |  {said(y)}" for name, (x, y) in found[key].items()]
        else:
            lines.append(f"{title}: the same")
    shared, first = found["shared_steps"], found["first_difference"]
    have = f"(A has {found['steps'][0]}, B {found['steps'][1]})"
    if not shared:
        lines.append(f"steps: none that both have: nothing is compared {have}")
    elif first is None:
        lines.append(f"steps: all {shared} that both have are the same to the last digit {have}")
    else:
        lines.append(f"steps: the first that differs is step {first['step']}")
        lines += [f"  {name:32s} {said(x)}  |  {said(y)}" for name, (x, y) in first["what"].items()]
    for row in found["weights"]:
        lines.append(f"weights at step {row['step']}: {'equal to the bit' if row['equal'] else 'not equal'}")
    both = [r for r in found["evaluations"] if r["a"] is not None and r["b"] is not None]
    if both:
        last = both[-1]
        lines.append(f"last evaluation of both, at step {last['step']}: {said(last['a'])}  |  {said(last['b'])}")
    return "\n".join(lines)


def said(value) -> str:
    return f"{value:.9g}" if isinstance(value, float) else json.dumps(value)
