"""What a sum over ranks costs here, by size and by who does it: who takes part, launches in turn, rows and fits."""

from __future__ import annotations

import socket
from pathlib import Path
from statistics import median

from hpc_lbsgd.bench.allreduce import choices
from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.bench.core.launches import Contender
from hpc_lbsgd.bench.core.spread import spread
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.theory import collectives
from hpc_lbsgd.theory.allreduce import SWITCH_BYTES

METRIC = "seconds of one float32 allreduce, median of repeats on the slowest rank, median over rounds"
PROGRAM = "hpc_lbsgd.bench.allreduce.measure"
SMALLEST, LARGEST = 2**10, 2**30

REFERENCE = ("ring", "halving-doubling", "binary-blocks", "torus", "hierarchical")
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}  # CPU ranks: the same for all that go through MPI
# torch-distributed is Gloo on CPU ranks and NCCL on GPUs
ALGORITHMS = (
    "horovod",
    "torch-distributed",
    "mpi",
    *(f"mpi-{a}" for a in choices.TUNED),
    *(f"reference-{a}" for a in REFERENCE),
)


def sizes(largest: int) -> list[int]:
    """1 KB and four times as much, up to `largest` bytes."""
    return [SMALLEST * 4**i for i in range(11) if SMALLEST * 4**i <= largest]


def contender(name: str, ranks: int, listed: list[int], seconds: float, node_size: int) -> Contender:
    task = {"bytes": listed, "seconds": seconds, "node_size": node_size}
    engine = {"horovod": "horovod", "torch-distributed": "torch"}.get(name)
    if engine:
        return Contender(name, {}, task | {"via": "engine", "engine": engine}, ranks)
    kind, _, algorithm = name.partition("-")
    settings = dict(YIELD)
    if kind == "mpi" and algorithm:
        settings |= choices.settings(algorithm)
    return Contender(name, settings, task | {"via": kind, "algorithm": algorithm}, ranks)


def steps_of(name: str, ranks: int, size_bytes: int, node_size: int) -> int | None:
    """Messages one after another, where the algorithm is known."""
    kind, _, algorithm = name.partition("-")
    if algorithm == "hierarchical":
        return collectives.hierarchical(ranks, size_bytes, node_size, size_bytes < SWITCH_BYTES).steps
    known = {"rabenseifner": "halving-doubling", "segmented-ring": "ring"}.get(algorithm, algorithm)
    return collectives.FORMULAS[known](ranks, size_bytes).steps if known in collectives.FORMULAS else None


def choose(names: list[str] | None, ranks: int) -> list[str]:
    """The algorithms to run; halving-doubling only where it can."""
    power = ranks & (ranks - 1) == 0
    if names is None:
        return [a for a in ALGORITHMS if power or a != "reference-halving-doubling"]
    for name in names:
        if name not in ALGORITHMS:
            raise RequestError(f"--algorithms {name}: allowed are {', '.join(ALGORITHMS)}")
        if name == "reference-halving-doubling" and not power:
            raise RequestError(f"--algorithms {name} on {ranks} ranks: it needs a power of two")
    return names


def measure(
    ranks: int, listed: list[int], names: list[str], rounds: int, seconds: float, node_size: int, timeout_s: float,
    oversubscribe: bool,
) -> dict:  # fmt: skip
    """Launch all in turn, and summarise."""
    contenders = [contender(name, ranks, listed, seconds, node_size) for name in names]
    times: dict[tuple[str, int], list[float]] = {}
    gammas, libraries = [], {}
    for who, result in launches.in_turn(PROGRAM, contenders, rounds, timeout_s, oversubscribe):
        gammas.append(result["gamma_s_per_byte"])
        libraries[who.name] = result["library"]
        if who.name.startswith("mpi-") and not result["library"].startswith("Open MPI"):
            raise RequestError(
                f"--algorithms {who.name}: Open MPI's parameters name it, and this is {result['library']}"
            )
        for row in result["rows"]:
            times.setdefault((who.name, row["bytes"]), []).append(row["seconds"])
    return summarise(ranks, times, median(gammas), libraries, rounds, node_size)


def summarise(
    ranks: int, times: dict[tuple[str, int], list[float]], gamma: float, libraries: dict, rounds: int, node_size: int
) -> dict:
    """Rows, fits and the best choice a size, from seconds by (algorithm, bytes). Pure."""
    rows = []
    for (name, size_bytes), found in times.items():
        seconds = median(found)
        rows.append(
            {
                "algorithm": name,
                "ranks": ranks,
                "bytes": size_bytes,
                **spread("seconds", found),
                "algbw_bytes_per_s": size_bytes / seconds,
                "busbw_bytes_per_s": collectives.bus_bandwidth(ranks, size_bytes, seconds),
            }
        )
    best = []
    for size_bytes in sorted({r["bytes"] for r in rows}):
        ordered = sorted((r for r in rows if r["bytes"] == size_bytes), key=lambda r: r["seconds"])
        runner_up = ordered[1]["seconds"] / ordered[0]["seconds"] if len(ordered) > 1 else None
        # a choice that the next best's rounds overlap with is not one to build on
        clear = len(ordered) == 1 or choices.clearly_faster(*ordered[:2], rounds)
        best.append(
            {
                "bytes": size_bytes,
                "algorithm": ordered[0]["algorithm"],
                "next_best_over_best": runner_up,
                "clear": clear,
            }
        )
    return {
        "metric": METRIC,
        "baseline": "mpi",
        "machine": socket.gethostname(),
        "ranks": ranks,
        "rounds": rounds,
        "libraries": libraries,
        "rows": rows,
        "fits": [fitted(name, ranks, rows, gamma, node_size) for name in dict.fromkeys(n for n, _ in times)],
        "best": best,
        "crossovers": [
            {"bytes": round((a["bytes"] * b["bytes"]) ** 0.5), "from": a["algorithm"], "to": b["algorithm"]}
            for a, b in zip(best, best[1:], strict=False)
            if a["algorithm"] != b["algorithm"]
        ],
    }


def fitted(name: str, ranks: int, rows: list[dict], gamma: float, node_size: int) -> dict:
    """Alpha, beta and gamma of one algorithm. Gamma is measured apart, by adding; beta is the rest of a byte's time."""
    mine = [r for r in rows if r["algorithm"] == name]
    if ranks < 2 or len(mine) < 2:
        return {
            "algorithm": name,
            "latency_s": None,
            "alpha_s": None,
            "beta_s_per_byte": None,
            "gamma_s_per_byte": gamma,
        }
    link = collectives.fit(1, ranks, [r["bytes"] for r in mine], [r["seconds"] for r in mine])
    steps = steps_of(name, ranks, mine[0]["bytes"], node_size)
    return {
        "algorithm": name,
        "latency_s": link.alpha,
        "steps": steps,
        "alpha_s": link.alpha / steps if steps else None,
        "beta_s_per_byte": max(0.0, link.beta - gamma / 2),  # T has 2 (p-1)/p b beta and (p-1)/p b gamma
        "gamma_s_per_byte": gamma,
    }


def allreduce(
    ranks: int, listed: list[int] | None, largest: int, names: list[str] | None, rounds: int, seconds: float,
    node_size: int, timeout_s: float, oversubscribe: bool, rules: Path | None,
) -> dict:  # fmt: skip
    """Everything that the command reports; the choices are written where asked for."""
    listed = listed or sizes(largest)
    for size_bytes in listed:
        if size_bytes % 4 or not 4 <= size_bytes <= LARGEST:
            raise RequestError(f"--bytes {size_bytes}: allowed are multiples of 4, up to {LARGEST}")
    names = choose(names, ranks)
    if rules:
        choices.check(rules, names)
    result = measure(ranks, listed, names, rounds, seconds, node_size, timeout_s, oversubscribe)
    if rules:
        result["choices"] = choices.write(rules, result)
    return result
