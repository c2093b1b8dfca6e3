"""Open MPI's rules for allreduce from a measured run: which algorithm at which size.

Its component `tuned` reads them from a file that the environment names, so that a site can include them. MPI's own
choice stays wherever nothing was measured to be clearly faster: at other numbers of ranks, and above the largest size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.bench.core.spread import SPREAD_ROUNDS
from hpc_lbsgd.errors import RequestError

# Open MPI's component `tuned`, parameter coll_tuned_allreduce_algorithm; with 0 it chooses itself
TUNED = {"tuned": 0, "recursive-doubling": 3, "ring": 4, "segmented-ring": 5, "rabenseifner": 6}
ALLREDUCE = 2  # the collective's number in a rules file


class Rule(NamedTuple):
    """From so many bytes on this algorithm, a name of TUNED."""

    from_bytes: int
    algorithm: str


def settings(algorithm: str) -> dict[str, str]:
    """Environment with which Open MPI sums by this algorithm of component `tuned`."""
    return {
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll_tuned_allreduce_algorithm": str(TUNED[algorithm]),
        "OMPI_MCA_coll_han_priority": "0",  # it would go before tuned where there are several nodes
    }


def environment(path: Path) -> dict[str, str]:
    """Environment with which Open MPI follows the rules in a file; a site's `environment` takes it as it is."""
    return {
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll_tuned_dynamic_rules_filename": str(path.absolute()),
        "OMPI_MCA_coll_han_priority": "0",
    }


def check(path: Path, names: list[str]) -> None:
    """Raises RequestError, before anything starts, where a run could not give rules."""
    launches.check_file("--choices", path)
    named = [f"mpi-{a}" for a in TUNED]
    if named[0] not in names or not set(named[1:]) & set(names):
        raise RequestError(f"--choices {path}: --algorithms must have {named[0]} and one or more of {named[1:]}")


def clearly_faster(one: dict, other: dict, rounds: int) -> bool:
    """No round of one size's row overlaps the other's."""
    return rounds >= SPREAD_ROUNDS and one["seconds_high"] < other["seconds_low"]


def rules(result: dict) -> list[Rule]:
    """From a summary of `bench allreduce`. A choice holds up to the geometric mean with the next size, the last one
    up to twice its size."""
    rows = {(r["algorithm"], r["bytes"]): r for r in result["rows"]}
    sizes = sorted({r["bytes"] for r in result["rows"]})
    chosen = []
    for size in sizes:
        own = rows["mpi-tuned", size]
        timed = [a for a in TUNED if (f"mpi-{a}", size) in rows]
        best = min(timed, key=lambda a: rows[f"mpi-{a}", size]["seconds"])
        chosen.append(best if clearly_faster(rows[f"mpi-{best}", size], own, result["rounds"]) else "tuned")
    edges = [0, *(round(math.sqrt(a * b)) for a, b in zip(sizes, sizes[1:], strict=False)), 2 * sizes[-1]]
    listed = [Rule(*pair) for pair in zip(edges, [*chosen, "tuned"], strict=True)]
    return [r for before, r in zip([None, *listed], listed, strict=False) if not before or before[1] != r.algorithm]


def costs(result: dict, listed: list[Rule]) -> list[int]:
    """Sizes at which MPI without these settings was clearly faster: another component than `tuned` sums there."""
    rows = {(r["algorithm"], r["bytes"]): r for r in result["rows"]}
    found = []
    for (name, size), plain in rows.items():
        if name == "mpi":
            ruled = rows["mpi-" + [r for r in listed if r.from_bytes <= size][-1].algorithm, size]
            if clearly_faster(plain, ruled, result["rounds"]):
                found.append(size)
    return sorted(found)


def to_text(result: dict, listed: list[Rule]) -> str:
    """The rules file. Open MPI takes the entry with the most ranks that are no more than a communicator has, so that
    the measured number of ranks needs a neighbour on each side."""
    own = [Rule(0, "tuned")]
    by_ranks = {1: own, result["ranks"]: listed, result["ranks"] + 1: own}
    lines = [
        f"# hpc-lbsgd bench allreduce: {result['ranks']} ranks on {result['machine']}, {result['rounds']} rounds",
        "# " + ", ".join(f"{number} {name}" for name, number in TUNED.items()),
        "1 # collectives",
        f"{ALLREDUCE} # allreduce",
        f"{len(by_ranks)} # numbers of ranks",
    ]
    for ranks, entries in by_ranks.items():
        lines += [f"{ranks} # ranks", f"{len(entries)} # sizes: from bytes, algorithm, fan-out, segment bytes"]
        lines += [f"{r.from_bytes} {TUNED[r.algorithm]} 0 0" for r in entries]
    return "\n".join(lines) + "\n"


def write(path: Path, result: dict) -> dict:
    """Write the rules of a measured run; returns what the report says of them."""
    listed = rules(result)
    path.write_text(to_text(result, listed))
    return {
        "file": str(path),
        "rules": [r._asdict() for r in listed],
        "environment": environment(path),
        "slower_than_mpi_bytes": costs(result, listed),
    }
