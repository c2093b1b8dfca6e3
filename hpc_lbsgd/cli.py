"""The commands: parse, call, print. No logic."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, RequestError, RunError
from hpc_lbsgd.parallel import world


class Parser(argparse.ArgumentParser):
    """Says what is wrong once, not once a rank."""

    def error(self, message: str):
        if world.from_environment().rank == 0:
            super().error(message)
        sys.exit(EXIT_REQUEST)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="hpc-lbsgd",
        description="Large-minibatch SGD on supercomputers: plan a run, train it, measure it.",
        epilog="Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 75 stopped at a safe point: "
        "start again.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, function, **kwargs) -> argparse.ArgumentParser:
        p = commands.add_parser(name, description=kwargs["help"] + ".", **kwargs)
        p.set_defaults(function=function)
        return p

    p = command("doctor", doctor, help="what this machine and environment can do, and the fix for what they cannot")
    p.add_argument("--mpi", action="store_true", help="start two real ranks a node; report the bandwidth of their sum")
    p.add_argument("--hosts", metavar="A,B", help="--mpi: these hosts (default: the nodes of the Slurm job, or here)")
    with_json(p)

    add_data(commands)
    add_runs(command)
    add_jobs(command)
    add_bench(commands)
    add_reproduce(command)
    return top


def add_data(commands) -> None:
    p = commands.add_parser("data", help="get, list and check a data set; print who gets which sample")
    data = p.add_subparsers(dest="data_command", metavar="fetch|index|pack|verify|order", required=True)
    p = data.add_parser("fetch", help="get a data set by name, as image files with a manifest")
    p.add_argument("name", choices=["fashion-mnist"])
    p.add_argument("--out", type=Path, help="folder to write to (default: data/NAME)")
    p.add_argument("--source", type=Path, help="folder with the original files, for machines without network")
    with_json(p).set_defaults(function=data_fetch)
    p = data.add_parser("index", help="list a data set in a manifest, decoding every image; nothing is copied")
    p.add_argument("dir", type=Path, help="DIR/CLASS/IMAGE tree; a tar, or a folder of tars (WebDataset, ILSVRC's)")
    p.add_argument("--out", type=Path, help="manifest file (default: DIR/manifest.arrow; beside a single tar)")
    p.add_argument("--labels", type=Path, help="tar of images without classes: a table with NAME,CLASS a line")
    p.add_argument("--classes-of", metavar="MANIFEST", help="number the classes as this manifest (the training set's)")
    p.add_argument("--processes", type=positive, help="decoding processes (default: one a core)")
    with_json(p).set_defaults(function=data_index)
    p = data.add_parser("pack", help="a data set as a few tar shards with an index; goes on where it was stopped")
    p.add_argument("manifest", help="manifest, or the folder that has one")
    p.add_argument("out", type=Path, help="folder to write to")
    stored = p.add_mutually_exclusive_group()
    stored.add_argument("--jpeg", type=quality, metavar="QUALITY", help="re-encode as JPEG (1 to 95)")
    stored.add_argument("--raw", action="store_true", help="store pixels, uint8: fastest to read, largest")
    side = p.add_mutually_exclusive_group()
    side.add_argument("--short-side", type=positive, metavar="PX", help="scale larger images down to this shorter side")
    side.add_argument("--long-side", type=positive, metavar="PX", help="scale larger images down to this longer side")
    p.add_argument("--grey", action="store_true", help="with --jpeg or --raw: one channel")
    p.add_argument("--shard-mb", type=positive_float, default=256.0, help="size of a shard (default: %(default)g)")
    p.add_argument("--processes", type=positive, help="packing processes (default: one a core)")
    with_json(p).set_defaults(function=data_pack)
    p = data.add_parser("verify", help="decode everything; list what is corrupt, odd or twice there")
    p.add_argument("data", help="manifest, the folder that has one, or a DIR/CLASS/IMAGE tree")
    p.add_argument(
        "--exclude", action="store_true", help="write exclude.txt: what cannot be used is left out from now on"
    )
    p.add_argument("--processes", type=positive, help="decoding processes (default: one a core)")
    with_json(p).set_defaults(function=data_verify)
    p = data.add_parser("order", help="which samples a worker gets in an epoch, in order")
    p.add_argument("recipe", nargs="?", help="recipe; or give --samples, --workers and --samples-per-worker")
    with_set(p)
    p.add_argument("--samples", type=positive, help="N")
    p.add_argument("--workers", type=positive, help="k")
    p.add_argument("--samples-per-worker", type=positive, help="n (default 32)")
    p.add_argument("--seed", type=int)
    p.add_argument("--last-batch", choices=["drop", "partial"])
    p.add_argument("--epoch", type=not_negative, default=0)
    p.add_argument("--worker", type=not_negative, default=0)
    with_json(p).set_defaults(function=data_order)


def add_runs(command) -> None:
    p = command("plan", plan, help="the run before it runs")
    with_recipe(p)
    p.add_argument("--nodes", type=positive, default=1)
    p.add_argument("--gpus-per-node", type=positive, default=8, help="ranks a node (default: %(default)s)")
    p.add_argument("--images-per-s", type=positive_float, help="a rank's measured rate without communication")
    p.add_argument("--system", metavar="PRESET", help="predict the step there; see bench simulate --list")
    p.add_argument("--steps", type=step_range, metavar="A:B", help="add a table of steps A to B-1")
    noise = p.add_mutually_exclusive_group()
    noise.add_argument(
        "--critical-batch", type=positive_float, metavar="B", help="add steps, examples and node-hours by batch"
    )
    noise.add_argument("--noise-from", metavar="RUN", help="the same, with the noise scale that a run measured")
    with_json(p)

    p = command(
        "train", train, help="train a recipe; under mpirun or srun every process is a rank, alone it is one rank"
    )
    with_recipe(p)
    with_run(p)
    with_json(p)


def add_jobs(command) -> None:
    p = command("launch", launch, help="compose and run the mpirun line of a job: launch --np 8 -- train RECIPE ...")
    p.add_argument("--np", type=positive, required=True, dest="ranks", help="ranks")
    with_hosts(p)
    p.add_argument("--dry-run", action="store_true", help="print the command and stop")
    p.add_argument("job", nargs=argparse.REMAINDER, help="-- train RECIPE ...")

    p = command("submit", submit, help="render the sbatch job of a recipe for a site, and submit it")
    with_recipe(p)
    p.add_argument("--nodes", type=positive, default=1, help="nodes (a chain: of the first stage)")
    p.add_argument("--site", default="generic", help="a site file, or the name of a shipped site (default: generic)")
    p.add_argument("--time", help="time limit of a job, as Slurm writes it (default: the site's)")
    p.add_argument("--run", help="run folder (default: RECIPE-TIME in the site's folder of runs)")
    p.add_argument("--resume", action="store_true", help="go on with the run that is in --run")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--chain", action="store_true", help="a job a stage, each with the nodes that its batch wants")
    what.add_argument(
        "--sweep", type=nodes_sweep, metavar="nodes=A,B", help="the scaling benchmark, a job a number; then its report"
    )
    what.add_argument("--data", action="store_true", help="list the recipe's data folders on a node, do not train")
    p.add_argument("--rounds", type=positive, help="--sweep: as bench scaling has it")
    p.add_argument("--steps", type=positive, help="--sweep: as bench scaling has it")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the script and stop")
    how.add_argument("--test-only", action="store_true", help="ask Slurm whether it would take the job, and stop")
    with_json(p)


def add_bench(commands) -> None:
    p = commands.add_parser("bench", help="measure loader, step and allreduce here; predict what more nodes would do")
    benches = p.add_subparsers(
        dest="bench_command", metavar="loader|rates|step|scaling|allreduce|simulate", required=True
    )
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
    with_json(p).set_defaults(function=bench_loader)
    p = benches.add_parser("rates", help="a recipe's step with synthetic batches, its loader alone, and both together")
    with_recipe(p)
    p.add_argument("--rounds", type=positive, default=5, help="measurements of each (default: %(default)s)")
    p.add_argument("--steps", type=positive, default=20, help="steps a measurement (default: %(default)s)")
    with_json(p).set_defaults(function=bench_rates)

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
    with_json(p).set_defaults(function=bench_simulate)

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
    with_json(p).set_defaults(function=bench_allreduce)

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
    with_json(p).set_defaults(function=bench_step)

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
    with_json(p).set_defaults(function=bench_scaling)


def add_reproduce(command) -> None:
    from hpc_lbsgd.reproduce.experiments import EXPERIMENTS, SCALES

    p = command("reproduce", reproduce, help="a paper's table or figure on data you have; go on with the same command")
    p.add_argument("experiment", choices=sorted(EXPERIMENTS))
    p.add_argument("--scale", choices=sorted(SCALES), default="small", help="size (default: %(default)s)")
    p.add_argument("--seeds", type=positive, default=3, help="runs a row (default: %(default)s)")
    with_set(p)
    p.add_argument("--out", type=Path, help="folder for runs, table and plot (default: runs/reproduce/SCALE)")
    p.add_argument("--ranks", type=positive, help="ranks of a run (default: one a GPU; one on CPUs)")
    p.add_argument("--jobs", type=positive, help="runs side by side (default: one a CPU core; one on GPUs)")
    p.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores")
    p.add_argument("--list", action="store_true", help="print the runs that it takes, and stop")
    with_json(p)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def counts(text: str) -> list[int]:
    if not all(word.isdigit() for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: expected whole numbers, such as 1,44")
    return [positive(word) for word in text.split(",")]


def nodes_sweep(text: str) -> list[int]:
    key, _, values = text.partition("=")
    if key != "nodes":
        raise argparse.ArgumentTypeError(f"{text}: expected nodes=A,B, such as nodes=1,2,4")
    return sorted(set(counts(values)))


def byte_count(text: str) -> int:
    number = text.upper().removesuffix("B")
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(number[-1:], 1)
    count = number.rstrip("KMG")
    if not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: expected a size, such as 64KB, 4MB or 1000")
    return positive(count) * factor


def byte_counts(text: str) -> list[int]:
    return [byte_count(word) for word in text.split(",")]


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be negative")
    return value


def quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 95:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 to 95")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def step_range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text}: expected A:B, such as 0:10")
    return int(first), int(last)


def with_json(p):
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, nothing else there")
    return p


def with_set(p):
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="change a recipe key, such as optim.base_lr=0.2; may be repeated",
    )


def with_launches(p):
    p.add_argument("--ranks", type=positive, default=2, help="ranks (default: %(default)s)")
    p.add_argument("--rounds", type=positive, default=5, help="launches of each, in turn (default: %(default)s)")
    p.add_argument("--timeout-s", type=positive_float, default=600.0, help="for one launch (default: %(default)s)")
    p.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw it too (PNG, SVG or PDF)")


def with_hosts(p):
    where = p.add_mutually_exclusive_group()
    where.add_argument("--hosts", help="hosts with their slots: a:8,b:8")
    where.add_argument("--hostfile", help="file of hosts, as mpirun takes it")
    p.add_argument("--mpi", choices=["openmpi", "mpich", "intel"], help="flavour (default: what mpirun says it is)")
    p.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores")


def with_recipe(p):
    p.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    with_set(p)


def with_run(p):
    p.add_argument("--run", help="run folder (default: runs/RECIPE-TIME; with --resume the newest of this recipe)")
    p.add_argument("--resume", action="store_true", help="go on from the run's newest good checkpoint")


# ---------------------------------------------------------------- commands


def doctor(args) -> int:
    from hpc_lbsgd.cluster import doctor as doctors

    findings = doctors.examine(args.mpi, args.hosts)
    if args.json:
        print(json.dumps({"findings": [f._asdict() for f in findings]}))
    else:
        print(doctors.show(findings))
    return EXIT_FAILED if any(f.level == doctors.FAIL for f in findings) else EXIT_DONE


def show_manifests(args, manifests) -> int:
    facts = [
        {
            "manifest": str(m.path),
            "samples": len(m),
            "classes": m.classes,
            "bytes": int(m.sizes.sum()),
            "fingerprint": m.fingerprint,
        }
        for m in manifests
    ]
    if args.json:
        print(json.dumps({"manifests": facts}))
    else:
        for f in facts:
            print(f"{f['manifest']}: {f['samples']} images in {len(f['classes'])} classes, {f['bytes'] / 1e6:.1f} MB")
    return EXIT_DONE


def data_fetch(args) -> int:
    from hpc_lbsgd.data import fetch

    return show_manifests(args, fetch.SOURCES[args.name](args.out or Path("data") / args.name, args.source))


def data_index(args) -> int:
    from hpc_lbsgd.data import archive, manifest

    classes = manifest.Manifest(manifest.find(args.classes_of)).classes if args.classes_of else None
    if archive.is_archive(args.dir):
        return show_manifests(args, [archive.index(args.dir, args.out, args.processes, args.labels, classes)])
    if args.labels or classes:
        raise RequestError(f"--labels and --classes-of are for tar files; {args.dir} is a tree of class folders")
    return show_manifests(args, [manifest.index(args.dir, args.out, args.processes)])


def data_pack(args) -> int:
    from hpc_lbsgd.data import pack

    kind = "raw" if args.raw else "jpeg" if args.jpeg else "keep"
    encoding = pack.Encoding(kind, args.short_side, args.long_side, args.jpeg or 90, 1 if args.grey else 3)
    return show_manifests(args, [pack.pack(args.manifest, args.out, encoding, args.shard_mb, args.processes)])


def data_verify(args) -> int:
    from hpc_lbsgd.data import verify

    found = verify.verify(args.data, args.processes)
    excluded = verify.write_excluded(found) if args.exclude else None
    print(json.dumps(verify.as_json(found, excluded)) if args.json else verify.show(found, excluded))
    return EXIT_FAILED if found.unusable and not args.exclude else EXIT_DONE


def data_order(args) -> int:
    from hpc_lbsgd.data.who import order

    found = order(
        args.recipe,
        args.settings,
        args.samples,
        args.workers,
        args.samples_per_worker,
        args.seed,
        args.last_batch,
        args.epoch,
        args.worker,
    )
    if args.json:
        print(json.dumps(found))
    else:
        for step, samples in enumerate(found["steps"]):
            print(f"{step:6d}  {' '.join(map(str, samples))}")
    return EXIT_DONE


def plan(args) -> int:
    from hpc_lbsgd import plan as plans
    from hpc_lbsgd import recipe as recipes

    recipe = recipes.read(args.recipe, args.settings)
    critical = plans.measured_noise_scale(args.noise_from) if args.noise_from else args.critical_batch
    result = plans.plan(recipe, args.nodes, args.gpus_per_node, args.images_per_s, args.steps, critical, args.system)
    print(json.dumps(result) if args.json else plans.show(Path(args.recipe).stem, recipe, result))
    return EXIT_DONE


def train(args) -> int:
    from hpc_lbsgd import recipe as recipes

    recipe = recipes.read(args.recipe, args.settings)
    from hpc_lbsgd.train import job

    return job.train(Path(args.recipe).stem, recipe, args.run, args.resume, args.json)


def bench_loader(args) -> int:
    from hpc_lbsgd.bench import loader

    result = loader.bench(
        args.sets, args.image_size, args.batch, args.threads, args.rounds, args.images, not args.no_peers, args.ffcv
    )
    if args.plot:
        loader.draw(result, args.plot)
    print(json.dumps(result) if args.json else loader.show(result))
    return EXIT_DONE


def bench_rates(args) -> int:
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.bench import rates

    result = rates.rates(recipes.read(args.recipe, args.settings), args.rounds, args.steps)
    if result:
        print(json.dumps(result) if args.json else rates.show(result))
    return EXIT_DONE


def reproduce(args) -> int:
    from hpc_lbsgd.reproduce import run

    return run.reproduce(
        args.experiment,
        args.scale,
        args.seeds,
        args.settings,
        args.out,
        args.ranks,
        args.jobs,
        args.oversubscribe,
        args.list,
        args.json,
    )


def bench_simulate(args) -> int:
    from hpc_lbsgd.bench import presets, simulate

    if args.list:
        found = {name: make().title for name, make in presets.PRESETS.items()}
        print(json.dumps(found) if args.json else "\n".join(f"{k:26s} {v}" for k, v in found.items()))
        return EXIT_DONE
    keys = ("ranks_per_node", "network_gbit", "input_images_per_s", "cores", "wire", "algorithm", "bucket_mb")
    changes = {key: getattr(args, key) for key in keys}
    asked = (args.published, args.calibrate, args.against, args.plot, args.json)
    simulate.simulate(args.preset, args.run, args.nodes, args.baseline, changes, *asked)
    return EXIT_DONE


def bench_allreduce(args) -> int:
    from hpc_lbsgd.bench import allreduce

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


def bench_step(args) -> int:
    from hpc_lbsgd.bench import step, tune

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


def bench_scaling(args) -> int:
    from hpc_lbsgd.bench import scaling
    from hpc_lbsgd.bench.launches import Place

    if args.report:
        return scaling.report(args.report, args.baseline, args.json)
    keys = ("ranks", "nodes", "ranks_per_node", "modes", "baseline", "rounds", "steps", "warm_ups", "timeout_s")
    asked = {key: getattr(args, key) for key in (*keys, "oversubscribe", "out")}
    request = scaling.Request(place=Place(args.hosts, args.hostfile, args.mpi), **asked)
    return scaling.scaling(args.recipe, args.settings, request, args.json)


def launch(args) -> int:
    from hpc_lbsgd.cluster import launch as launches
    from hpc_lbsgd.parallel.launchers import Layout

    job = args.job[1:] if args.job[:1] == ["--"] else args.job
    if job[:1] != ["train"]:
        raise RequestError(
            f"launch runs `train`: launch --np {args.ranks} -- train RECIPE ... (got {' '.join(job) or 'nothing'})"
        )
    inner = parser().parse_args(job)
    layout = Layout(args.ranks, args.hosts, args.hostfile, args.oversubscribe)
    return launches.launch(layout, inner, args.dry_run, args.mpi)


def submit(args) -> int:
    from hpc_lbsgd.cluster import submit as submits

    keys = ("nodes", "run", "resume", "chain", "sweep", "rounds", "steps", "data", "dry_run", "test_only")
    request = submits.Request(time_limit=args.time, **{key: getattr(args, key) for key in keys})
    return submits.submit(args.recipe, args.settings, args.site, request, args.json)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.function(args)
    except RequestError as problem:
        # every rank finds the same fault in a recipe; one says so
        if world.from_environment().rank == 0:
            print(f"hpc-lbsgd: {problem}", file=sys.stderr)
        return EXIT_REQUEST
    except RunError as problem:
        print(f"hpc-lbsgd: {problem}", file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
