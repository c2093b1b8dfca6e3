"""What `doctor` can only say after real ranks have met: --mpi, --nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.cluster import check_ranks, mpi_check, node_check
from hpc_lbsgd.cluster.finding import FAIL, OK, WARN, Finding
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.progress import note
from hpc_lbsgd.schedulers import known


def check_mpi(hosts: str | None) -> Iterator[Finding]:
    """Ranks that really start and sum."""
    facts = check_ranks.measure(mpi_check.__name__, hosts, mpi_check.RANKS_PER_NODE)
    if "problem" in facts:
        yield Finding(FAIL, "mpi sum", facts["problem"], "docs/troubleshooting.md, by the message")
        return
    where = f"{facts['ranks']} ranks on {len(facts['nodes'])} nodes ({', '.join(facts['nodes'])}), {facts['device']}"
    speed = f"{facts['bytes'] / 2**20:.0f} MB in {1e3 * facts['seconds']:.1f} ms, "
    speed += f"bus bandwidth {facts['busbw_bytes_per_s'] / 1e9:.2f} GB/s"
    yield Finding(
        OK if facts["right"] else FAIL,
        "mpi sum",
        f"{where}: {speed}" if facts["right"] else f"{where}: the sum is wrong",
        "MPI or the network is broken: try another MPI module, and tell the cluster's support",
    )
    promised = known.cores() or (4 if facts["device"] == "cuda" else 1)
    yield Finding(
        OK if facts["cores"] >= promised else WARN,
        "cores a rank",
        f"{facts['cores']:g} at least, of {promised} to be expected",
        "ranks share cores, or the launcher hides them: srun --cpus-per-task on its own line, cores_per_node in the "
        "site file",
    )
    if len(facts["nodes"]) > 1:
        skew = facts["clock_skew_s"]
        fix = "clocks of the nodes differ: ask for NTP; logs of several nodes are hard to compare"
        yield Finding(OK if skew < 1 else WARN, "clock skew", f"at most {1e3 * skew:.1f} ms", fix)


def check_nodes(hosts: str | None, read: Path | None) -> Iterator[Finding]:
    """Nodes that are far slower than the others."""
    import torch

    each = torch.cuda.device_count() or 1
    words = ["--read", str(read)] if read else []
    facts = check_ranks.measure(node_check.__name__, hosts, each, words)
    if "problem" in facts:
        yield Finding(FAIL, "nodes", facts["problem"], "docs/troubleshooting.md, by the message")
        return
    rates = ", ".join(node_check.told(what, rate) for what, rate in facts["median"].items())
    yield Finding(OK, "nodes", f"{facts['ranks']} ranks on {len(facts['nodes'])} nodes, {facts['device']}: {rates}")
    for one in facts["slow"]:
        yield Finding(
            WARN,
            "slow",
            str(node_check.Slow(**one)),
            "leave the node out (preflight_nodes in the site file), and tell the site",
        )


def slow_nodes(recipe: str, settings: list[str], hosts: str, ranks_per_node: int) -> list[str]:
    """Nodes far slower than the others, at computing, copying, sending, and reading what the recipe trains on; without
    their domain. Raises RunError where ranks did not start and end on all of them."""
    data = recipes.read(recipe, settings).data.train
    words = ["--read", data] if data and Path(data).exists() else []
    facts = check_ranks.measure(node_check.__name__, hosts, ranks_per_node, words)
    if "problem" in facts:
        raise RunError(f"nodes were not measured: {facts['problem']}")
    rates = ", ".join(node_check.told(what, rate) for what, rate in facts["median"].items())
    note(f"{len(facts['nodes'])} nodes measured in {facts['seconds']:.0f} s: {rates}")
    for one in facts["slow"]:
        note(f"slow: {node_check.Slow(**one)}")
    return [host.partition(".")[0] for host in facts["slow_nodes"]]
