"""`bench simulate`: parse, call, print. No logic."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.arguments import add_command, counts, positive, positive_float, with_json
from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.errors import EXIT_DONE, RequestError

# theory.simulate's, which would load numpy for every --help; tests/unit/test_help.py holds them together
ALGORITHMS = ("ring", "tree", "nccl", "hierarchical", "torus")


def add(benches) -> None:
    p = add_command(
        benches,
        "simulate",
        help="predict step time and efficiency on more nodes, from a preset or a run",
        example="bench simulate --preset goyal-p100-50gbe --nodes 1,44",
    )
    p.add_argument("--preset", default="goyal-p100-50gbe", help="the system (default: %(default)s); see --list")
    p.add_argument("--list", action="store_true", help="name the presets, and stop")
    p.add_argument("--published", action="store_true", help="predictions beside published efficiencies, and stop")
    p.add_argument(
        "--from", dest="run", metavar="RUN", help="take the workload, and with several ranks the links, of a run"
    )
    p.add_argument(
        "--calibrate", type=Path, nargs="+", metavar="RESULT",
        help="outputs of bench step --json on 1 rank and on one a core, several of each are rounds; predict those of "
        "--against, and stop",
    )  # fmt: skip
    p.add_argument(
        "--against", type=Path, nargs="+", metavar="RESULT", help="outputs of bench step --json on more ranks than that"
    )
    p.add_argument("--nodes", type=counts, metavar="A,B", help="numbers of nodes (default: 1 to 4096)")
    p.add_argument(
        "--baseline", type=positive, metavar="RANKS", help="what efficiency is relative to (default: the preset's)"
    )
    p.add_argument("--ranks-per-node", type=positive, help="ranks a node (default: the preset's, as all below)")
    p.add_argument("--network-gbit", type=positive_float, help="line rate of a node's network, Gbit/s")
    p.add_argument("--input-images-per-s", type=positive_float, help="what a node's input delivers (default: enough)")
    p.add_argument("--cores", type=positive, help="ranks that compute on CPUs: cores of a node, which they share")
    p.add_argument("--wire", choices=["int64", "int32", "fp32", "fp16"], help="type in which gradients travel")
    p.add_argument("--algorithm", choices=ALGORITHMS, metavar="NAME", help=f"of the sum: {', '.join(ALGORITHMS)}")
    p.add_argument("--bucket-mb", type=positive_float, help="size of a gradient bucket, MB")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw it too (PNG, SVG or PDF)")
    with_json(p).set_defaults(function=run)


def run(args) -> int:
    from hpc_lbsgd.bench.simulate import calibrate, presets, show
    from hpc_lbsgd.bench.simulate import run as simulator

    tables = [flag for flag in ("list", "published", "calibrate", "against") if getattr(args, flag)]
    if args.plot and tables:
        raise RequestError(f"--plot {args.plot}: draws a prediction, and --{tables[0]} gives a table")
    if args.list:
        titles = {name: make().title for name, make in presets.PRESETS.items()}
        give(titles, show.show_titles, args.json)
    elif args.calibrate or args.against:
        give(calibrate.compare(args.calibrate, args.against), show.show_compared, args.json)
    elif args.published:
        give(simulator.against_published(), show.show_published, args.json)
    else:
        keys = ("ranks_per_node", "network_gbit", "input_images_per_s", "cores", "wire", "algorithm", "bucket_mb")
        chosen = simulator.choose(args.preset, args.run, **{key: getattr(args, key) for key in keys})
        result = simulator.predict(args.preset, chosen, args.nodes or simulator.NODES, args.baseline)
        give(result, show.show, args.json, args.plot, show.plot)
    return EXIT_DONE
