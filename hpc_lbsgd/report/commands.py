"""`watch`, `report` and `compare`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path

from hpc_lbsgd.arguments import positive_float, with_json
from hpc_lbsgd.errors import EXIT_DONE


def add(command) -> None:
    """Add them to the top level's commands."""
    p = command("watch", watch, help="a run as it goes: progress, ETA, loss, speed, checkpoints, what happened last")
    p.add_argument("run", help="run folder")
    p.add_argument("--once", action="store_true", help="print it once and stop")
    p.add_argument("--every-s", type=positive_float, default=2.0, help="seconds between looks (default: %(default)g)")
    with_json(p)

    p = command("report", report, help="one HTML page of runs: curves, and why it is slow; and of scaling studies")
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="run folder, or a folder of bench scaling")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: FOLDER/report.html; of several report.html)"
    )
    p.add_argument("--figures", type=Path, metavar="DIR", help="each figure as a file, too")
    p.add_argument("--format", choices=["png", "svg", "pdf"], default="png", help="of --figures (default: png)")

    p = command("compare", compare, help="the first step at which two runs differ, and in what")
    p.add_argument("a", metavar="A", help="run folder")
    p.add_argument("b", metavar="B", help="run folder")
    with_json(p)


def watch(args) -> int:
    from hpc_lbsgd.report import watch as watches

    watches.watch(args.run, args.once, args.every_s, args.json)
    return EXIT_DONE


def report(args) -> int:
    from hpc_lbsgd.report import page

    print(page.report(args.folders, args.out, args.figures, args.format))
    return EXIT_DONE


def compare(args) -> int:
    from hpc_lbsgd.report import compare as compares

    found = compares.compare(args.a, args.b)
    print(json.dumps(found) if args.json else compares.show(found))
    return EXIT_DONE
