"""The commands of `bench`: one a package, in the order of --help."""

from __future__ import annotations

from hpc_lbsgd.arguments import add_command
from hpc_lbsgd.bench.allreduce import command as allreduce
from hpc_lbsgd.bench.checkpoint import command as checkpoint
from hpc_lbsgd.bench.loader import command as loader
from hpc_lbsgd.bench.rates import command as rates
from hpc_lbsgd.bench.scaling import command as scaling
from hpc_lbsgd.bench.simulate import command as simulate
from hpc_lbsgd.bench.step import command as step


def add(commands) -> None:
    """Add `bench` to the top level's commands."""
    p = add_command(commands, "bench", help="measure loader, step and allreduce here; predict what more nodes would do")
    benches = p.add_subparsers(dest="bench_command", metavar="BENCHMARK", required=True)
    for benchmark in (loader, rates, step, scaling, allreduce, checkpoint, simulate):
        benchmark.add(benches)
