"""The commands of `bench`: parse, call, print. No logic."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_lbsgd.arguments import (
    byte_count,
    byte_counts,
    counts,
    positive,
    positive_float,
    with_hosts,
    with_json,
    with_launches,
    with_recipe,
    with_set,
)
from hpc_lbsgd.errors import EXIT_DONE, RequestError


def add(commands) -> None:
    """Add `bench` to the top level's commands."""
    p = commands.add_parser("bench", help="measure loader, step and allreduce here; predict what more nodes would do")
    benches = p.add_subparsers(
        dest="bench_command", metavar="loader|rates|step|scaling|allreduce|simulate", required=True
    )
    for add_one in (add_loader, add_rates, add_simulate, add_allreduce, add_step, add_scaling):
        add_one(benches)


def add_loader(benches) -> None:
    p = benches.add_parser("loader", help="images a second of our loader and its peers, taking turns in one run")
    p.add_argument("sets", nargs="+", help="image-file sets, for us and the peers; packed sets, for us")
    p.add_argument("--image-size", type=positive, default=224, help="pixels (default: %(default)s)")
    p.add_argument("--batch", type=positive, default=64, help="images a batch (default: %(default)s)")
    p.add_argument("--threads", type=counts, default=[1, 2], help="decoding threads, such as 1,2,4 (default: 1,2)")
    p.add_argument("--rounds", type=positive, default=5, help="measurements of each (default: %(default)s)")
    p.add_argument("--images", type=positive, default=1000, help="images a measurement (default: %(default)s)")
    p.add_argument("--no-peers", action="store_true", help="only ours")
    p.add_argument("--plot", type=Path, help="PNG to write")
    p.add_argument("--ffcv", action="store_true", help="FFCV too, if it is installed: JPEG and raw of its own format")
    with_json(p).set_defaults(function=run_loader)


def run_loader(args) -> int:
    from hpc_lbsgd.bench.loader import run as loader

    result = loader.bench(
        args.sets, args.image_size, args.batch, args.threads, args.rounds, args.images, not args.no_peers, args.ffcv
    )
    if args.plot:
        loader.draw(result, args.plot)
    print(json.dumps(result) if args.json else loader.show(result))
    return EXIT_DONE


def add_rates(benches) -> None:
    p = benches.add_parser("rates", help="a recipe's step with synthetic batches, its loader alone, and both together")
    with_recipe(p)
    p.add_argument("--rounds", type=positive, default=5, help="measurements of each (default: %(default)s)")
    p.add_argument("--steps", type=positive, default=20, help="steps a measurement (default: %(default)s)")
    with_json(p).set_defaults(function=run_rates)


def run_rates(args) -> int:
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.bench.core import timing as rates

    result = rates.rates(recipes.read(args.recipe, args.settings), args.rounds, args.steps)
    if result:
        print(json.dumps(result) if args.json else rates.show(result))
    return EXIT_DONE


def add_simulate(benches) -> None:
    p = benches.add_parser("simulate", help="predict step time and efficiency on more nodes, from a preset or a run")
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
    p.add_argument("--baseline", type=positive, metavar="RANKS", help="what efficiency is relative to")
    p.add_argument("--ranks-per-node", type=positive)
    p.add_argument("--network-gbit", type=positive_float, help="line rate of a node's network, Gbit/s")
    p.add_argument("--input-images-per-s", type=positive_float, help="what a node's input delivers (default: enough)")
    p.add_argument("--cores", type=positive, help="ranks that compute on CPUs: cores of a node, which they share")
    p.add_argument("--wire", choices=["fp32", "fp16"])
    p.add_argument("--algorithm", choices=["ring", "tree", "nccl", "hierarchical", "torus"])
    p.add_argument("--bucket-mb", type=positive_float)
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw it too (PNG, SVG or PDF)")
    with_json(p).set_defaults(function=run_simulate)


def run_simulate(args) -> int:
    from hpc_lbsgd.bench.simulate import presets
    from hpc_lbsgd.bench.simulate import run as simulate

    if args.list:
        found = {name: make().title for name, make in presets.PRESETS.items()}
        print(json.dumps(found) if args.json else "\n".join(f"{k:26s} {v}" for k, v in found.items()))
        return EXIT_DONE
    keys = ("ranks_per_node", "network_gbit", "input_images_per_s", "cores", "wire", "algorithm", "bucket_mb")
    changes = {key: getattr(args, key) for key in keys}
    asked = (args.published, args.calibrate, args.against, args.plot, args.json)
    simulate.simulate(args.preset, args.run, args.nodes, args.baseline, changes, *asked)
    return EXIT_DONE


def add_allreduce(benches) -> None:
    p = benches.add_parser(
        "allreduce", help="time sums over ranks by size: Horovod, torch.distributed, MPI by algorithm"
    )
    with_launches(p)
    p.add_argument(
        "--bytes", type=byte_counts, metavar="A,B", help="sizes, such as 1KB,4MB (default: 1KB and on, by 4)"
    )
    p.add_argument("--largest", type=byte_count, default=2**26, help="of the default sizes (default: 64MB)")
    p.add_argument("--algorithms", type=lambda text: text.split(","), metavar="A,B", help="default: all")
    p.add_argument("--seconds", type=positive_float, default=0.5, help="to spend on each size (default: %(default)s)")
    p.add_argument("--node-size", type=positive, default=2, help="ranks a node of reference-hierarchical")
    p.add_argument(
        "--choices", type=Path, metavar="FILE", help="write the best of Open MPI's algorithms by size, for a site"
    )
    with_json(p).set_defaults(function=run_allreduce)


def run_allreduce(args) -> int:
    from hpc_lbsgd.bench.allreduce import run as allreduce

    allreduce.allreduce(
        args.ranks,
        args.bytes,
        args.largest,
        args.algorithms,
        args.rounds,
        args.seconds,
        args.node_size,
        args.timeout_s,
        args.oversubscribe,
        args.choices,
        args.plot,
        args.json,
    )
    return EXIT_DONE


def add_step(benches) -> None:
    p = benches.add_parser(
        "step", help="time training steps on synthetic pictures: ours, stock Horovod, DDP, one process"
    )
    with_launches(p)
    p.add_argument("--batch", type=counts, default=[8, 128], metavar="A,B", help="samples a rank (default: 8,128)")
    p.add_argument("--engines", type=lambda text: text.split(","), metavar="A,B", help="default: all in float32")
    p.add_argument("--model", default="resnet20", help="as a recipe's model.name (default: %(default)s)")
    p.add_argument("--image-size", type=positive, default=32, help="pixels (default: %(default)s)")
    p.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    p.add_argument("--warm-ups", type=positive, default=5, help="steps before timing (default: %(default)s)")
    p.add_argument(
        "--steps", type=positive, default=20,
        help="timed steps of the largest batch; smaller ones get as many images, up to 16 times the steps "
        "(default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--threads", type=positive, help="of a CPU rank, the same for all (default: cores / ranks)")
    p.add_argument(
        "--tune", type=lambda text: text.split(","), nargs="?", const=["all"], metavar="A,B",
        help="search the machine keys of the gradient path instead: buckets, first-bucket, fusion, cycle, yield, "
        "allreduce (default: all)",
    )  # fmt: skip
    p.add_argument("--out", type=Path, default="tuned.yaml", help="--tune: file to write (default: %(default)s)")
    p.add_argument(
        "--fp16", action="store_true", help="--tune: time the fp16 wire too; it changes results and is never written"
    )
    with_json(p).set_defaults(function=run_step)


def run_step(args) -> int:
    from hpc_lbsgd.bench.step import run as step
    from hpc_lbsgd.bench.step.tune import run as tune

    work = (args.batch, args.model, args.image_size, args.precision, args.warm_ups, args.steps, args.threads)
    task, launches = step.task_of(args.ranks, *work), (args.rounds, args.timeout_s, args.oversubscribe)
    if args.tune:
        for flag, value in (("--engines", args.engines), ("--plot", args.plot)):
            if value:
                raise RequestError(f"{flag} {value}: not with --tune, which compares settings of one engine")
        tune.tune(args.ranks, task, args.tune, args.fp16, *launches, args.out, args.json)
    else:
        step.step(args.ranks, task, args.engines, *launches, args.plot, args.json)
    return EXIT_DONE


def add_scaling(benches) -> None:
    p = benches.add_parser(
        "scaling", help="weak and strong scaling of a recipe's step; its synthetic, loader and end-to-end rates"
    )
    p.add_argument("recipe", nargs="?", default="bench-resnet20", help="file or shipped name (default: %(default)s)")
    with_set(p)
    how_many = p.add_mutually_exclusive_group()
    how_many.add_argument("--ranks", type=counts, metavar="A,B", help="default: those that mpirun or srun started")
    how_many.add_argument("--nodes", type=counts, metavar="A,B", help="the same in nodes, with --ranks-per-node")
    how_many.add_argument("--report", type=Path, metavar="DIR", help="measure nothing, report on what DIR has")
    p.add_argument("--ranks-per-node", type=positive)
    p.add_argument("--mode", action="append", choices=["weak", "strong"], dest="modes", help="default: both")
    p.add_argument("--baseline", type=positive, metavar="RANKS", help="of the efficiency (default: the fewest ranks)")
    p.add_argument("--rounds", type=positive, default=5, help="measurements of each, in turn (default: %(default)s)")
    p.add_argument("--steps", type=positive, default=20, help="timed steps of a measurement (default: %(default)s)")
    p.add_argument("--warm-ups", type=positive, default=5, help="steps before timing (default: %(default)s)")
    p.add_argument("--timeout-s", type=positive_float, default=600.0, help="for one launch (default: %(default)s)")
    p.add_argument("--out", type=Path, help="folder of the results (default: runs/scaling-RECIPE)")
    with_hosts(p)
    with_json(p).set_defaults(function=run_scaling)


def run_scaling(args) -> int:
    from hpc_lbsgd.bench.core.launches import Place
    from hpc_lbsgd.bench.scaling import run as scaling

    if args.report:
        return scaling.report(args.report, args.baseline, args.json)
    keys = ("ranks", "nodes", "ranks_per_node", "modes", "baseline", "rounds", "steps", "warm_ups", "timeout_s")
    asked = {key: getattr(args, key) for key in (*keys, "oversubscribe", "out")}
    request = scaling.Request(place=Place(args.hosts, args.hostfile, args.mpi), **asked)
    return scaling.scaling(args.recipe, args.settings, request, args.json)
