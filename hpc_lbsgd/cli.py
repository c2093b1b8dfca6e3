"""The commands: parse, call, print. No logic."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from hpc_lbsgd import __version__, completion, progress
from hpc_lbsgd.arguments import (
    add_command,
    positive,
    positive_float,
    step_range,
    with_amend,
    with_hosts,
    with_json,
    with_recipe,
    with_run,
    with_say,
    with_set,
)
from hpc_lbsgd.bench import commands as bench
from hpc_lbsgd.cluster import commands as batch
from hpc_lbsgd.complaints import complain, leave_to_rank_0
from hpc_lbsgd.data import commands as data
from hpc_lbsgd.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REQUEST,
    RequestError,
    RunError,
    did_you_mean,
)
from hpc_lbsgd.parallel import world
from hpc_lbsgd.parallel.launchers import FLAVOURS
from hpc_lbsgd.report import commands as reports
from hpc_lbsgd.runs import name_of
from hpc_lbsgd.signals import Steadfast
from hpc_lbsgd.trained import commands as trained


class Parser(argparse.ArgumentParser):
    """Says what is wrong once, not once a rank."""

    def error(self, message: str):
        if not leave_to_rank_0():
            super().error(message)
        sys.exit(EXIT_REQUEST)

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            (commands,) = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            flags = [flag for a in completion.actions(commands.choices[found.command]) for flag in a.option_strings]
            self.error(f"unrecognized arguments: {' '.join(rest)}{did_you_mean(rest[0].partition('=')[0], flags)}")
        return found

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as problem:
            problem.message += did_you_mean(str(value), map(str, action.choices))
            raise


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="hpc-lbsgd",
        description="Large-minibatch SGD on supercomputers: plan a run, train it, measure it.",
        epilog="Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 75 stopped at a safe point: "
        "start again, 130 ended by Ctrl-C.",
    )
    with_say(top)
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, function, **words) -> argparse.ArgumentParser:
        p = add_command(commands, name, **words)
        p.set_defaults(function=function)
        return p

    p = command("doctor", doctor, help="what this machine and environment can do, and the fix for what they cannot")
    p.add_argument("--mpi", action="store_true", help="start two real ranks a node; report the bandwidth of their sum")
    p.add_argument(
        "--nodes", action="store_true", help="measure each node for some seconds; name those far below others"
    )
    p.add_argument("--read", type=Path, metavar="PATH", help="--nodes: what a run will read, a file or a folder")
    p.add_argument(
        "--hosts", metavar="A,B", help="--mpi, --nodes: these (default: the nodes of the batch job, or here)"
    )
    with_json(p)

    add_beginning(command)
    data.add(commands)
    add_runs(command)
    reports.add(command)
    trained.add(command)
    add_launch(command)
    batch.add(command)
    bench.add(commands)
    add_reproduce(command)
    p = command("completion", complete, help="what a shell reads to complete commands, flags, recipes and keys at TAB")
    p.add_argument("shell", choices=completion.SHELLS, help='for bash: eval "$(hpc-lbsgd completion bash)"')
    return top


def add_beginning(command) -> None:
    p = command("init", init, help="a first recipe for your own images, each choice with its reason")
    p.add_argument("dir", type=Path, help="DIR/CLASS/IMAGE, DIR/train and DIR/val of them, or tar files")
    p.add_argument("--out", type=Path, metavar="FILE", help="the recipe (default: NAME.yaml in this folder)")
    p.add_argument("--small", action="store_true", help="64 pixels and ResNet-20: for CPUs, and for a first look")
    p.add_argument("--exclude", action="store_true", help="leave out images that do not decode, and list them")
    p.add_argument("--processes", type=positive, help="decoding processes (default: one a core)")

    p = command("recipes", list_recipes, help="the recipes that are shipped")
    p.add_argument("--schema", action="store_true", help="print the JSON schema of a recipe instead, for editors")
    with_json(p)


def add_runs(command) -> None:
    p = command(
        "plan", plan, help="the run before it runs, or as it was decided and amended since",
        example="plan goyal-resnet50 --nodes 32",
    )  # fmt: skip
    with_recipe(p, "a recipe file, the name of a shipped recipe, or a run folder")
    p.add_argument("--nodes", type=positive, help="nodes (default: this machine)")
    p.add_argument("--gpus-per-node", type=positive, help="ranks a node (default: with --nodes 8)")
    p.add_argument("--images-per-s", type=positive_float, help="a rank's measured rate without communication")
    p.add_argument("--system", metavar="PRESET", help="predict the step there; named by bench simulate --list")
    p.add_argument("--steps", type=step_range, metavar="A:B", help="add a table of steps A to B-1")
    noise = p.add_mutually_exclusive_group()
    noise.add_argument(
        "--critical-batch", type=positive_float, metavar="B",
        help="samples; add steps, examples and node-hours by batch",
    )  # fmt: skip
    noise.add_argument("--noise-from", metavar="RUN", help="the same, with the noise scale that a run measured")
    with_json(p)

    p = command(
        "train", train, help="train a recipe; under mpirun or srun every process is a rank, alone it is one rank",
        example="train fashion-mnist --run runs/first",
    )  # fmt: skip
    with_recipe(p)
    with_run(p)
    with_json(p)

    p = command("resume", resume, help="go on with a run, on as many ranks as before")
    p.add_argument("run", help="run folder")
    with_set(p)
    p.add_argument("--np", type=positive, dest="ranks", help="ranks (default: those of its last start)")
    p.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores")
    with_amend(p)
    p.add_argument("--dry-run", action="store_true", help="print the command and stop")
    with_json(p)

    p = command("preflight", preflight, help="does this model, data and machine keep the promise? train asks it first")
    with_recipe(p)
    with_json(p)


def add_launch(command) -> None:
    p = command("launch", launch, help="compose and run the mpirun line of a job",
                example="launch --np 8 -- train fashion-mnist --run runs/first")  # fmt: skip
    p.add_argument("--np", type=positive, required=True, dest="ranks", metavar="RANKS", help="ranks to start")
    with_hosts(p, FLAVOURS)
    p.add_argument("--dry-run", action="store_true", help="print the command and stop")
    p.add_argument("job", nargs=argparse.REMAINDER, help="-- train RECIPE ..., -- preflight RECIPE or -- audit RUN ...")


def add_reproduce(command) -> None:
    from hpc_lbsgd.reproduce.experiments import EXPERIMENTS, SCALES

    p = command("reproduce", reproduce, help="a paper's table or figure on data you have; go on with the same command",
                example="reproduce goyal-table1 --scale small --list")  # fmt: skip
    names = sorted(EXPERIMENTS)
    p.add_argument("experiment", choices=names, metavar="EXPERIMENT", help=f"one of {', '.join(names)}")
    p.add_argument("--scale", choices=sorted(SCALES), default="small", help="data set and size (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="a fifth of the epochs: a first look, and how long all takes")
    p.add_argument("--seeds", type=positive, help="runs a row (default: 3; with --quick 1)")
    with_set(p)
    p.add_argument("--out", type=Path, help="folder for runs, table and plot (default: runs/reproduce/SCALE)")
    p.add_argument("--ranks", type=positive, help="ranks of a run (default: one a GPU; one on CPUs)")
    p.add_argument("--jobs", type=positive, help="runs side by side (default: one a CPU core; one on GPUs)")
    p.add_argument("--oversubscribe", action="store_true", help="allow more ranks than cores")
    p.add_argument("--list", action="store_true", help="print the runs that it takes, and stop")
    with_json(p)


# ---------------------------------------------------------------- commands


def doctor(args) -> int:
    from hpc_lbsgd.cluster import doctor as doctors

    if args.read and not (args.nodes and args.read.exists()):
        raise RequestError(f"--read {args.read}: {'no such file or folder' if args.nodes else 'only with --nodes'}")
    findings = doctors.examine(args.mpi, args.nodes, args.hosts, args.read)
    if args.json:
        print(json.dumps({"findings": [f._asdict() for f in findings]}))
    else:
        print(doctors.show(findings))
    return EXIT_FAILED if any(f.level == "fail" for f in findings) else EXIT_DONE


def init(args) -> int:
    from hpc_lbsgd import first_recipe

    print(first_recipe.show(first_recipe.init(args.dir, args.out, args.small, args.exclude, args.processes)))
    return EXIT_DONE


def list_recipes(args) -> int:
    from hpc_lbsgd import reading
    from hpc_lbsgd import recipe as recipes

    if args.schema:
        print(json.dumps(recipes.schema(), indent=1))
        return EXIT_DONE
    found = {name: reading.heading(name) for name in reading.shipped()}
    print(json.dumps({"recipes": found}) if args.json else "\n".join(f"{n:34s} {h}" for n, h in found.items()))
    return EXIT_DONE


def resume(args) -> int:
    from hpc_lbsgd.cluster import resume as resumes

    return resumes.resume(args.run, args.ranks, args.oversubscribe, args.settings, args.amend, args.json, args.dry_run)


def plan(args) -> int:
    from hpc_lbsgd import plan as plans
    from hpc_lbsgd import plan_show
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.records import RunFolder

    folder, past, words = RunFolder(args.recipe), (), [args.recipe]
    if folder.exists():
        if args.settings:
            raise RequestError(f"--set {args.settings[0]}: {args.recipe} is a run, and has its recipe (see --amend)")
        recipe, *past = plans.of_run(folder)
        words = [str(folder.recipe)]
    else:
        recipe = recipes.read(args.recipe, args.settings)
        words += [word for setting in args.settings for word in ("--set", setting)]
    critical = plans.measured_noise_scale(args.noise_from) if args.noise_from else args.critical_batch
    where = (args.nodes, args.gpus_per_node, args.images_per_s)
    result = plans.plan(recipe, *where, args.steps, critical, args.system, *past, run=folder if past else None)
    print(json.dumps(result) if args.json else plan_show.show(name_of(args.recipe), recipe, result, words))
    return EXIT_DONE


def train(args) -> int:
    from hpc_lbsgd import amend
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.train.laps import Laps, kept_for_good

    laps = Laps()
    recipe = recipes.read(args.recipe, args.settings)
    changes = amend.of_request(args.amend, args.resume)
    from hpc_lbsgd.train.stops import Stops

    stops = Stops(world.from_environment().size == 1)
    stops.listen()
    laps.end("request")
    with kept_for_good():
        from hpc_lbsgd.train import job
    laps.end("imports")

    return job.train(name_of(args.recipe), recipe, args.run, args.resume, args.json, changes, stops, laps)


def preflight(args) -> int:
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.train.laps import kept_for_good

    recipe = recipes.read(args.recipe, [*args.settings, "train.preflight=true"])
    with kept_for_good():
        from hpc_lbsgd.train import job

    return job.preflight(recipe, args.json)


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
        args.quick,
    )


def launch(args) -> int:
    from hpc_lbsgd.cluster import launch as launches
    from hpc_lbsgd.parallel.launchers import Layout
    from hpc_lbsgd.records import RunFolder

    job = args.job[1:] if args.job[:1] == ["--"] else args.job
    if job[:1] not in (["train"], ["preflight"], ["audit"]):
        raise RequestError(
            f"launch runs `train`, `preflight` or `audit`: launch --np {args.ranks} -- train RECIPE ... "
            f"(got {' '.join(job) or 'nothing'})"
        )
    inner = parser().parse_args(job, argparse.Namespace(words=job))
    if inner.command == "audit":
        inner.recipe = str(RunFolder(inner.run).recipe)
    listen(inner)
    layout = Layout(args.ranks, args.hosts, args.hostfile, args.oversubscribe)
    return launches.launch(layout, inner, args.dry_run, args.mpi)


def complete(args) -> int:
    print(completion.script(args.shell))
    return EXIT_DONE


def listen(args) -> None:
    """What -q and -v say holds for this process and all that it starts."""
    os.environ.update({progress.SAY: args.say} if "say" in args else {})


def main(argv: list[str] | None = None) -> int:
    commands = parser()
    completion.answer(commands)
    args = commands.parse_args(argv)
    listen(args)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have any bytes
    runs = args.command in ("train", "launch")
    if runs:  # what cannot be told any more must not end them
        sys.stdout, sys.stderr = Steadfast(sys.stdout), Steadfast(sys.stderr)
    try:
        code = args.function(args)
        sys.stdout.flush()  # here, where it can be said that it fails
        return code
    except KeyboardInterrupt:
        print("hpc-lbsgd: ended by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return EXIT_FAILED if runs else EXIT_DONE
    except (RequestError, RunError, OSError) as problem:
        return complain(problem)


def run() -> None:
    """The program. Ctrl-C ends it at once: Python would wait for threads, which may wait for a disk that hangs."""
    code = main()
    if code == EXIT_INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
