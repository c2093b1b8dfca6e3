"""The folder of a scaling benchmark, and what its launches say together.

    request.json            what is measured: the recipe, k of strong scaling; and on how many ranks
    launches/00008-02.json  what rank 0 of one launch wrote: ranks, then round
    results.json            all launches together; scaling.md, scaling.png

Launches come from one command that starts them in turn, or from jobs that know nothing of each other.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np

from hpc_lbsgd.bench.core.spread import spread
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import flatten
from hpc_lbsgd.records import write_atomically

METRIC = "images/s over all ranks, barrier to barrier; median over rounds"
PERCENTILES = (50, 90, 99)


class Folder:
    def __init__(self, path: Path):
        self.path = Path(path)
        self.request_file = self.path / "request.json"
        self.launches_folder = self.path / "launches"
        self.results = self.path / "results.json"
        self.table = self.path / "scaling.md"
        self.plot = self.path / "scaling.png"

    def request(self) -> dict | None:
        return json.loads(self.request_file.read_text()) if self.request_file.exists() else None

    def check(self, request: dict) -> None:
        """Raises RequestError where the folder holds measurements of something else."""
        before = self.request()
        if before is None:
            return
        old, new = flatten(before), flatten(request)
        other = [k for k in sorted(old.keys() | new.keys()) if k not in ("name", "ranks") and old.get(k) != new.get(k)]
        if other:
            listed = "; ".join(f"{key} = {new.get(key)} (there: {old.get(key)})" for key in other[:5])
            raise RequestError(
                f"--out {self.path}: holds measurements of something else: {listed}; name another folder"
            )

    def claim(self, request: dict) -> None:
        """Write down what is to be measured here, in addition to what was asked before. Raises as `check` does."""
        self.check(request)
        ranks = {*request["ranks"], *(self.request() or request)["ranks"]}
        try:
            self.launches_folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.request_file, json.dumps(request | {"ranks": sorted(ranks)}, indent=1) + "\n")
        except OSError as problem:
            raise RequestError(f"--out {self.path}: cannot be written: {problem.strerror or problem}") from None

    def forget(self, ranks: list[int]) -> None:
        """Remove launches on so many ranks: they are to be measured anew."""
        for count in ranks:
            for path in self.launches_folder.glob(f"{count:05d}-*.json"):
                path.unlink(missing_ok=True)

    def add(self, number: int, launch: dict) -> None:
        """Keep a launch under its round. The first round of a launch that has several is `number`."""
        for i in range(len(next(iter(launch["modes"].values()))["rounds"])):
            modes = {mode: found | {"rounds": found["rounds"][i : i + 1]} for mode, found in launch["modes"].items()}
            path = self.launches_folder / f"{launch['ranks']:05d}-{number + i:02d}.json"
            write_atomically(path, json.dumps(launch | {"round": number + i, "modes": modes}) + "\n")

    def launches(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.launches_folder.glob("*.json"))]


# ---------------------------------------------------------------- all launches together; pure


def summarise(request: dict, launches: list[dict], baseline: int | None = None) -> dict:
    """Rows by mode and number of ranks, with what is missing named.

    baseline: ranks that efficiency is relative to (default: the smallest number that was measured). Raises
    RequestError where it was not measured.
    """
    measured = sorted({launch["ranks"] for launch in launches})
    if not measured:
        raise RequestError(f"nothing was measured yet: no launch on {', '.join(map(str, request['ranks']))} ranks")
    if baseline not in (None, *measured):
        raise RequestError(f"--baseline {baseline}: measured were {', '.join(map(str, measured))} ranks")
    baseline = baseline or measured[0]
    rows = []
    for mode in ("weak", "strong"):
        found = {ranks: [x for x in launches if x["ranks"] == ranks and mode in x["modes"]] for ranks in measured}
        if not found[baseline]:
            continue
        rows += [row(mode, ranks, mine, found[baseline]) for ranks, mine in found.items() if mine]
    data = request["recipe"]["data"]
    return {
        "metric": METRIC,
        "baseline": f"{baseline} rank{'s' * (baseline > 1)}, images/s a rank, through the same path, in the same mode",
        "baseline_ranks": baseline,
        "recipe": request["name"],
        "data": data["dataset"] or data["train"],
        "machine": ", ".join(sorted({launch["device"] for launch in launches})),
        "threads": sorted({launch["threads"] for launch in launches}),
        "engine": ", ".join(sorted({launch["engine"] for launch in launches})),
        "missing_ranks": [ranks for ranks in request["ranks"] if ranks not in measured],
        "rows": rows,
    }


def row(mode: str, ranks: int, mine: list[dict], baseline: list[dict]) -> dict:
    """One number of ranks in one mode, from its launches and the baseline's."""
    about = mine[0]["modes"][mode]
    rates = {what: rounds_of(mine, mode, what) for what in about["rounds"][0]}
    steps = [found for found in rounds_of(mine, mode, "synthetic").values()]
    waits = list(rates.get("end-to-end", rates["synthetic"]).values())
    efficiencies = efficiency(ranks, rates["synthetic"], baseline[0]["ranks"], rounds_of(baseline, mode, "synthetic"))
    percentiles = np.percentile([s for found in steps for s in found["step_s"]], PERCENTILES)
    result = {
        "mode": mode,
        "ranks": ranks,
        "nodes": len(set(mine[-1]["hosts"])),
        "global_batch": about["global_batch"],
        "passes_per_step": about["passes_per_step"],
        **spread("images_per_s", (found["images_per_s"] for found in steps)),
        **spread("efficiency", efficiencies),
        **{f"step_s_p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "data_wait_share": median(found["data_wait_share"] for found in waits),
        "exposed_comm_share": median(found["exposed_comm_share"] for found in steps),
        **slowest([found["own_s"] for found in steps], mine[-1]["hosts"]),
        "rounds": len(steps),
        "rates": {what: median(f["images_per_s"] for f in found.values()) for what, found in rates.items()},
    }
    if "end-to-end" in rates:
        result["end_to_end_efficiency"] = median(
            efficiency(ranks, rates["end-to-end"], baseline[0]["ranks"], rounds_of(baseline, mode, "end-to-end"))
        )
    return result


def rounds_of(launches: list[dict], mode: str, what: str) -> dict[int, dict]:
    """One rate's records by round."""
    return {launch["round"]: launch["modes"][mode]["rounds"][0][what] for launch in launches}


def efficiency(ranks: int, mine: dict[int, dict], baseline_ranks: int, baseline: dict[int, dict]) -> list[float]:
    """Images/s a rank over the baseline's, round by round: launches of one round ran next to each other."""
    shared = sorted(mine.keys() & baseline.keys())
    return [
        mine[r]["images_per_s"] / ranks / (baseline[r]["images_per_s"] / baseline_ranks) for r in shared
    ]  # round 0 is always there


def slowest(own_s: list[list[float]], hosts: list[str]) -> dict:
    """The rank whose own work takes longest, and by what share of the median rank's.

    own_s: a list a round, each by rank; seconds of a step without the wait for others.
    """
    by_rank = [median(same) for same in zip(*own_s, strict=True)]
    worst = max(range(len(by_rank)), key=lambda rank: by_rank[rank])
    return {
        "slowest_rank": worst,
        "slowest_host": hosts[worst],
        "slowest_over_median": by_rank[worst] / median(by_rank) - 1,
        "ranks_by_host": dict(Counter(hosts)),
    }
