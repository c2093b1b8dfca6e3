"""`bench step`: parse, call, print. No logic."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.arguments import add_command, counts, positive, with_json, with_launches
from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.errors import EXIT_DONE, RequestError


def add(benches) -> None:
    p = add_command(
        benches,
        "step",
        help="time training steps on synthetic pictures: ours, stock Horovod, DDP, one process",
        example="bench step --ranks 2 --batch 8,128 --plot step.png",
    )
    with_launches(p)
    p.add_argument("--batch", type=counts, default=[8, 128], metavar="A,B", help="samples a rank (default: 8,128)")
    p.add_argument(
        "--engines",
        type=lambda text: text.split(","),
        metavar="A,B",
        help="who trains (default: all that do so in float32)",
    )
    p.add_argument("--model", default="resnet20", help="as a recipe's model.name (default: %(default)s)")
    p.add_argument("--image-size", type=positive, default=32, help="pixels (default: %(default)s)")
    p.add_argument("--precision", choices=["float32", "bf16"], default="float32", help="default: %(default)s")
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
    with_json(p).set_defaults(function=run)


def run(args) -> int:
    from hpc_lbsgd.bench.step.run import step, task_of

    work = (args.batch, args.model, args.image_size, args.precision, args.warm_ups, args.steps, args.threads)
    task, launches = task_of(args.ranks, *work), (args.rounds, args.timeout_s, args.oversubscribe)
    if args.tune:
        from hpc_lbsgd.bench.step.tune.run import tune
        from hpc_lbsgd.bench.step.tune.show import show

        for flag, value in (("--engines", args.engines), ("--plot", args.plot)):
            if value:
                raise RequestError(f"{flag} {value}: not with --tune, which compares settings of one engine")
        give(tune(args.ranks, task, args.tune, args.fp16, *launches, args.out), show, args.json)
    else:
        from hpc_lbsgd.bench.step.show import plot, show

        give(step(args.ranks, task, args.engines, *launches), show, args.json, args.plot, plot)
    return EXIT_DONE
