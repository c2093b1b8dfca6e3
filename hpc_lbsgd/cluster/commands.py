"""The commands of a batch system: parse, call, print. No logic."""

from __future__ import annotations

from pathlib import Path

from hpc_lbsgd.arguments import nodes_sweep, not_negative, positive, positive_float, with_json, with_recipe
from hpc_lbsgd.errors import EXIT_DONE
from hpc_lbsgd.runs import RESUME


def add(command) -> None:
    p = command("submit", submit, help="write the batch script of a recipe for a site, and submit it",
                example="submit goyal-resnet50 --nodes 32 --site my-site.yaml")  # fmt: skip
    with_recipe(p)
    p.add_argument(
        "--nodes", default="1",
        help="nodes; 4-32: as many of them as are free; a chain: of the first stage (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--spare", type=not_negative, default=0, metavar="N",
        help="N nodes more, without ranks: to stand in for lost and slow ones (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--grow-every", type=positive_float, metavar="HOURS", dest="grow_every_hours",
        help="with fewer nodes than it may have, and some free: stop safely, queue again, get more",
    )  # fmt: skip
    p.add_argument("--site", default="generic", help="a site file, or a shipped site's name (default: %(default)s)")
    p.add_argument("--time", help="time limit of a job, such as 2-12:00:00 (default: the site's)")
    p.add_argument("--time-min", help="Slurm: to which it may be shortened, so that the job starts earlier")
    p.add_argument("--deadline", metavar="TIME", help="Slurm, LSF: it must be over by then: 2026-12-24T18:00")
    p.add_argument("--images-per-s", type=positive_float, help="a rank's measured rate: says what will be reached")
    p.add_argument(
        "--run",
        help="run folder, of an array that of its runs (default: RECIPE-TIME in the site's folder of runs; with "
        "--resume the newest)",
    )
    p.add_argument(
        RESUME, action="store_const", const=RESUME, help="go on with the run that is in --run; refused where none is"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--array", metavar="KEY=A-B", help="a job and a run folder a value of a recipe's key: seed=0-4, or KEY=A,B,C"
    )
    what.add_argument("--chain", action="store_true", help="a job a stage, each with the nodes that its batch wants")
    what.add_argument(
        "--sweep", type=nodes_sweep, metavar="nodes=A,B", help="the scaling benchmark, a job a number; then its report"
    )
    what.add_argument("--data", action="store_true", help="list the recipe's data folders on a node, do not train")
    p.add_argument("--rounds", type=positive, help="--sweep: rounds, as bench scaling has them")
    p.add_argument("--steps", type=positive, help="--sweep: steps, as bench scaling has them")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the script and stop")
    how.add_argument("--test-only", action="store_true", help="Slurm: ask whether it would take the job, and stop")
    with_json(p)

    p = command("bundle", bundle, help="pack this environment into one file, which jobs unpack on each of their nodes",
                example="bundle /scratch/me/environment.tar")  # fmt: skip
    p.add_argument("file", type=Path, help="where all nodes see it; a site file names it: bundle")
    with_json(p)

    p = command("stage-bundle", stage_bundle, help="for batch scripts: unpack a bundle on this node; print its Python")
    p.add_argument("file", type=Path, help="the bundle")

    p = command("suspects", suspects, help="for batch scripts: hosts that hung, or were slow, in a run's last start")
    p.add_argument("run", help="run folder")

    p = command("slow-nodes", slow_nodes, help="for batch scripts: measure nodes before a run; print the slow ones")
    with_recipe(p)
    p.add_argument("--hosts", required=True, metavar="A,B", help="the nodes")
    p.add_argument("--ranks-per-node", type=positive, default=1, help="ranks that measure (default: %(default)s)")

    p = command("own", own, help="for batch scripts: take a run folder for this job, its ranks and its restarts")
    p.add_argument("--run", required=True, help="run folder")
    end = p.add_mutually_exclusive_group()
    end.add_argument("--release", type=int, metavar="CODE", help="give it up: the job ends with CODE, for good")
    end.add_argument("--pass-to", metavar="JOB", help="another job goes on with the run")


def submit(args) -> int:
    from dataclasses import fields

    from hpc_lbsgd.cluster import submission
    from hpc_lbsgd.cluster.jobs import Request

    request = Request(**{field.name: getattr(args, field.name) for field in fields(Request)})
    return submission.command(args.recipe, args.settings, args.site, request, args.dry_run, args.test_only, args.json)


def bundle(args) -> int:
    import json

    from hpc_lbsgd.cluster import bundle as bundles

    what, outside = bundles.pack(args.file), bundles.outside()
    facts = {"file": str(args.file), "checksum": what.checksum, "files": what.files, "bytes": what.bytes,
             "python": what.python, "base": what.base, "outside": outside}  # fmt: skip
    print(
        json.dumps(facts)
        if args.json
        else f"{args.file}: {what.files} files, {what.bytes / 1e9:.1f} GB on a node's disk; nodes must have Python "
        f"{what.python} at {what.base}\nin the site file: bundle: {args.file.absolute()}"
    )
    if outside and not args.json:
        print("not packed, and read from where they are by each rank: " + ", ".join(outside))
    return EXIT_DONE


def stage_bundle(args) -> int:
    from hpc_lbsgd.cluster import unbundle

    print(*unbundle.here(args.file))
    return EXIT_DONE


def suspects(args) -> int:
    from hpc_lbsgd.cluster import suspects as found

    print(*found.suspects(args.run))
    return EXIT_DONE


def slow_nodes(args) -> int:
    from hpc_lbsgd.cluster import on_ranks

    print(*on_ranks.slow_nodes(args.recipe, args.settings, args.hosts, args.ranks_per_node))
    return EXIT_DONE


def own(args) -> int:
    from hpc_lbsgd import owner

    owner.own(args.run, args.release, args.pass_to)
    return EXIT_DONE
