"""`bench allreduce`: parse, call, print. No logic."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.arguments import add_command, byte_count, byte_counts, positive, positive_float, with_json, with_launches
from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.errors import EXIT_DONE


def add(benches) -> None:
    p = add_command(
        benches,
        "allreduce",
        help="time sums over ranks by size: Horovod, torch.distributed, MPI by algorithm",
        example="bench allreduce --ranks 4 --bytes 64KB,4MB",
    )
    with_launches(p)
    p.add_argument(
        "--bytes", type=byte_counts, metavar="A,B", help="sizes, such as 1KB,4MB (default: 1KB and on, by 4)"
    )
    p.add_argument("--largest", type=byte_count, default=2**26, help="largest of the default sizes (default: 64MB)")
    p.add_argument(
        "--algorithms", type=lambda text: text.split(","), metavar="A,B", help="who sums (default: all there are)"
    )
    p.add_argument("--seconds", type=positive_float, default=0.5, help="seconds for each size (default: %(default)s)")
    p.add_argument("--node-size", type=positive, default=2, help="ranks a node of reference-hierarchical (default: 2)")
    p.add_argument(
        "--choices", type=Path, metavar="FILE", help="write the best of Open MPI's algorithms by size, for a site"
    )
    with_json(p).set_defaults(function=run)


def run(args) -> int:
    from hpc_lbsgd.bench.allreduce.run import allreduce
    from hpc_lbsgd.bench.allreduce.show import plot, show

    result = allreduce(
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
    )
    give(result, show, args.json, args.plot, plot)
    return EXIT_DONE
