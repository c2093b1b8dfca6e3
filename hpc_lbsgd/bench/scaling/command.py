"""`bench scaling`: parse, call, print. No logic."""

from __future__ import annotations

import sys
from pathlib import Path

from hpc_lbsgd import progress
from hpc_lbsgd.arguments import add_command, counts, positive, positive_float, with_hosts, with_json, with_set
from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED
from hpc_lbsgd.parallel.launchers import FLAVOURS


def add(benches) -> None:
    p = add_command(
        benches,
        "scaling",
        help="weak and strong scaling of a recipe's step; its synthetic, loader and end-to-end rates",
        example="bench scaling goyal-resnet50 --ranks 1,2,4,8",
    )
    p.add_argument("recipe", nargs="?", default="bench-resnet20", help="file or shipped name (default: %(default)s)")
    with_set(p)
    how_many = p.add_mutually_exclusive_group()
    how_many.add_argument(
        "--ranks", type=counts, metavar="A,B", help="numbers of ranks (default: those that mpirun or srun started)"
    )
    how_many.add_argument("--nodes", type=counts, metavar="A,B", help="the same in nodes, with --ranks-per-node")
    how_many.add_argument("--report", type=Path, metavar="DIR", help="measure nothing, report on what DIR has")
    p.add_argument("--ranks-per-node", type=positive, help="ranks a node, for --nodes")
    p.add_argument(
        "--mode", action="append", choices=["weak", "strong"], dest="modes", help="may be repeated (default: both)"
    )
    p.add_argument(
        "--baseline", type=positive, metavar="RANKS", help="what efficiency is relative to (default: the fewest ranks)"
    )
    p.add_argument("--rounds", type=positive, default=5, help="measurements of each, in turn (default: %(default)s)")
    p.add_argument("--steps", type=positive, default=20, help="timed steps of a measurement (default: %(default)s)")
    p.add_argument("--warm-ups", type=positive, default=5, help="steps before timing (default: %(default)s)")
    p.add_argument(
        "--timeout-s", type=positive_float, default=600.0, help="seconds for one launch (default: %(default)g)"
    )
    p.add_argument("--out", type=Path, help="folder of the results (default: runs/scaling-RECIPE)")
    with_hosts(p, FLAVOURS)
    with_json(p).set_defaults(function=run)


def run(args) -> int:
    from hpc_lbsgd.bench.core.launches import Place
    from hpc_lbsgd.bench.scaling.run import Request, scaling

    if args.report:
        missing = report(args.report, args)["missing_ranks"]
        for ranks in missing:
            said = f"no result on {ranks} ranks in {args.report}: its job failed, or is not over"
            print(f"hpc-lbsgd: {said}", file=sys.stderr)
        return EXIT_FAILED if missing else EXIT_DONE
    keys = ("ranks", "nodes", "ranks_per_node", "modes", "baseline", "rounds", "steps", "warm_ups", "timeout_s")
    asked = {key: getattr(args, key) for key in (*keys, "oversubscribe", "out")}
    folder = scaling(args.recipe, args.settings, Request(place=Place(args.hosts, args.hostfile, args.mpi), **asked))
    if folder:  # on one rank
        report(folder, args)
    return EXIT_DONE


def report(folder: Path, args) -> dict:
    from hpc_lbsgd.bench.scaling.show import report, show

    result = report(folder, args.baseline)
    give(result, show, args.json)
    progress.note(f"report: {folder}")
    return result
