"""`bench checkpoint`: parse, call, print. No logic."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.arguments import add_command, positive, with_json
from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.errors import EXIT_DONE

MODELS = ["goyal-resnet50", "fashion-mnist"]


def add(benches) -> None:
    p = add_command(
        benches,
        "checkpoint",
        help="what a checkpoint holds the steps up: written at once, and behind them",
        example="bench checkpoint --recipes goyal-resnet50 --folder /scratch",
    )
    p.add_argument("--recipes", nargs="+", default=MODELS, help="whose models (default: goyal-resnet50 fashion-mnist)")
    p.add_argument("--folder", type=Path, default=Path(), help="on whose disk (default: the current folder)")
    p.add_argument("--rounds", type=positive, default=7, help="checkpoints of each way (default: %(default)s)")
    with_json(p).set_defaults(function=run)


def run(args) -> int:
    from hpc_lbsgd.bench.checkpoint.run import checkpoint
    from hpc_lbsgd.bench.checkpoint.show import show

    give(checkpoint(args.recipes, args.folder, args.rounds), show, args.json)
    return EXIT_DONE
