"""`bench loader`: parse, call, print. No logic."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_lbsgd.arguments import add_command, counts, positive, with_json
from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.errors import EXIT_DONE

FORMATS = ("ffcv", "streaming", "webdataset")


def formats(text: str) -> list[str]:
    for name in text.split(","):
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"{name or 'nothing'}: expected names of {', '.join(FORMATS)}")
    return list(dict.fromkeys(text.split(",")))


def add(benches) -> None:
    p = add_command(
        benches, "loader", help="images a second of our loader and its peers, taking turns in one run; on GPUs too",
        example="bench loader data/val data/val-packed --threads 1,2,4",
    )  # fmt: skip
    p.add_argument("sets", nargs="+", help="image-file sets, for us and the peers; packed sets, for us")
    p.add_argument("--image-size", type=positive, default=224, help="pixels (default: %(default)s)")
    p.add_argument("--batch", type=positive, default=64, help="images a batch (default: %(default)s)")
    p.add_argument("--threads", type=counts, default=[1, 2], help="decoding threads, such as 1,2,4 (default: 1,2)")
    p.add_argument("--rounds", type=positive, default=5, help="measurements of each (default: %(default)s)")
    p.add_argument("--images", type=positive, default=1000, help="images a measurement (default: %(default)s)")
    p.add_argument("--no-peers", action="store_true", help="only ours")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw it too (PNG, SVG or PDF)")
    p.add_argument(
        "--formats", type=formats, default=[], metavar="A,B",
        help="peers too that read files of their own, if installed; these are written first: " + ", ".join(FORMATS),
    )  # fmt: skip
    p.add_argument("--limit", action="store_true", help="what the decoder alone could give, too")
    with_json(p).set_defaults(function=run)


def run(args) -> int:
    from hpc_lbsgd.bench.loader.run import loader
    from hpc_lbsgd.bench.loader.show import plot, show

    result = loader(
        args.sets,
        args.image_size,
        args.batch,
        args.threads,
        args.rounds,
        args.images,
        not args.no_peers,
        args.formats,
        args.limit,
    )
    give(result, show, args.json, args.plot, plot)
    return EXIT_DONE
