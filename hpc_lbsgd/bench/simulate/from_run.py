"""A system for the simulator from a run that was measured, in place of a preset's numbers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.simulate.workload import layers
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.theory.simulate import System, Workload, step

WARM_UP_SHARE = 0.2  # of a run's steps, at its start, that are left out
FEWEST_STEPS = 5


class Measured(NamedTuple):
    """Medians over a run's steps, in seconds, as rank 0 saw them."""

    ranks: int
    ranks_per_node: int
    compute_s: float  # what is left of a step without waiting for data and for sums
    exposed_comm_s: float
    steps: int


def measure(folder: RunFolder) -> Measured:
    """Raises RequestError where the run has too few full steps."""
    found = list(read_metrics(folder.metrics))
    start = next((r for r in found if r["kind"] == "start"), None)
    steps = [r for r in found if r["kind"] == "step" and r["samples"] == r["global_batch"]]
    steps = steps[math.ceil(len(steps) * WARM_UP_SHARE) :]
    if start is None or len(steps) < FEWEST_STEPS:
        raise RequestError(
            f"--from {folder.path}: {len(steps)} full steps after warm-up; at least {FEWEST_STEPS} are needed"
        )
    starts = folder.starts()
    ranks = starts[-1].get("ranks") if starts else None
    if not ranks:
        raise RequestError(f"--from {folder.path}: {folder.environment.name} is gone or damaged; it says which nodes")
    hosts = Counter(r["host"] for r in ranks)
    return Measured(
        start["ranks"],
        max(hosts.values()),
        median(r["step_s"] - r["exposed_comm_s"] - r["data_wait_s"] for r in steps),
        median(r["exposed_comm_s"] for r in steps),
        len(steps),
    )


def workload_of(recipe, compute_s: float, ranks: int) -> Workload:
    """What a rank computes in a step, from its recipe's model and a measured time; backward is two thirds."""
    samples = recipe.batch.kn / ranks
    return Workload(layers(recipe, recipe.data.classes), round(samples), compute_s / 3, 2 * compute_s / 3)


def calibrated(system: System, run: str) -> tuple[System, Measured]:
    """`system` with the run's workload; and, where the run had more than one rank, with links as fast as make the
    simulated exposed communication equal the measured.

    Everything that a rank waited for at the end of backward counts as bandwidth: slow partners too.
    """
    folder = RunFolder(run)
    if not folder.exists():
        raise RequestError(f"--from {run}: no run there")
    recipe = recipes.load_resolved(folder.recipe)
    found = measure(folder)
    system = replace(system, workload=workload_of(recipe, found.compute_s, found.ranks))
    system = replace(system, cluster=replace(system.cluster, ranks_per_node=found.ranks_per_node))
    if found.ranks == 1:
        return system, found
    nodes = math.ceil(found.ranks / found.ranks_per_node)
    return replace(system, cluster=matched_links(system, nodes, found.exposed_comm_s)), found


def matched_links(system: System, nodes: int, exposed_s: float):
    """The cluster with both links scaled so that a step on `nodes` nodes exposes `exposed_s` of communication."""

    def scaled(factor: float) -> System:
        c = system.cluster
        return replace(system, cluster=replace(c, inter=c.inter * factor, intra=c.intra * factor))

    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if step(scaled(middle), nodes).exposed_comm_s > exposed_s else (low, middle)
    return scaled(high).cluster
