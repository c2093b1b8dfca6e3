"""What is measured on which numbers of ranks, and how they take turns.

Given numbers of ranks it starts them in turn with mpirun. Given none, it measures the ranks that it was itself started
on (srun, mpirun): a batch job of a sweep. Either way its launches go to one folder, and the report covers all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.core import launches
from hpc_lbsgd.bench.core.launches import HERE, Contender, Place
from hpc_lbsgd.bench.scaling.results import Folder
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.launchers import check_hosts, slots_of
from hpc_lbsgd.recipe import Recipe

MODES = ("weak", "strong")
PROGRAM = "hpc_lbsgd.bench.scaling.measure"


@dataclass(frozen=True)
class Request:
    """What the user asks for, beside the recipe."""

    ranks: list[int] | None = None
    nodes: list[int] | None = None
    ranks_per_node: int | None = None
    modes: list[str] | None = None
    baseline: int | None = None
    rounds: int = 5
    steps: int = 20
    warm_ups: int = 5
    timeout_s: float = 600.0
    oversubscribe: bool = False
    place: Place = HERE
    out: Path | None = None


# ---------------------------------------------------------------- what is asked for; pure


def counts_of(request: Request) -> list[int] | None:
    """Numbers of ranks, rising; None: those that this process is one of. Raises RequestError for what fits nothing."""
    if request.nodes and not request.ranks_per_node:
        raise RequestError("--nodes: say how many ranks a node has with --ranks-per-node")
    counts = [n * request.ranks_per_node for n in request.nodes] if request.nodes else request.ranks
    if not counts:
        if request.baseline:
            raise RequestError(f"--baseline {request.baseline}: give it with --ranks or --nodes, or later to --report")
        return None
    counts = sorted(set(counts))
    if request.baseline not in (None, *counts):
        raise RequestError(
            f"--baseline {request.baseline}: not one of the numbers of ranks, {', '.join(map(str, counts))}"
        )
    if request.place.hosts:
        check_hosts(request.place.hosts, counts[-1])
    if request.place.hostfile and not Path(request.place.hostfile).is_file():
        raise RequestError(f"--hostfile {request.place.hostfile}: no such file")
    return counts


def strong_workers(recipe: Recipe, counts: list[int], modes: list[str] | None) -> int | None:
    """k of strong scaling: the recipe's, else a full pass for each of the most ranks; None where it is not measured.

    Raises RequestError where k would leave ranks idle, or one number of ranks alone cannot say.
    """
    if "strong" not in (modes or MODES):
        return None
    workers = recipe.batch.workers
    if workers == "per_rank":
        if len(counts) == 1:
            if modes:
                raise RequestError(
                    "--mode strong on one number of ranks: say the global batch with --set batch.workers=K"
                )
            return None
        return counts[-1] * recipe.machine.workers_per_pass
    if workers < counts[-1]:
        raise RequestError(
            f"batch.workers = {workers} on {counts[-1]} ranks: strong scaling would leave ranks idle; set more, or "
            "per_rank (a full pass for each of the most ranks), or measure fewer ranks"
        )
    return workers


def threads_of(request: Request, counts: list[int]) -> int:
    """Threads of a CPU rank, the same on all numbers of ranks: cores over the most ranks that share this machine."""
    together = request.ranks_per_node or counts[-1]
    if request.place.hosts:
        together = max(slots_of(host)[1] for host in request.place.hosts.split(","))
    return max(1, worlds.cores() // together)


def question(name: str, recipe: Recipe, counts: list[int], modes: list[str] | None) -> dict:
    """What request.json holds: what must be the same for launches to be compared, and the numbers of ranks."""
    strong = strong_workers(recipe, counts, modes)
    settled = recipe.with_workers(strong) if strong else recipe
    return {"name": name, "recipe": settled.model_dump(mode="json"), "ranks": counts}


def task_of(asked: dict, request: Request, rounds: int) -> dict:
    """What the ranks are told."""
    settled = asked["recipe"]["batch"]["workers"] != "per_rank"
    modes = [mode for mode in request.modes or MODES if mode == "weak" or settled]
    facts = {"steps": request.steps, "warm_ups": request.warm_ups, "rounds": rounds, "modes": modes}
    return {"recipe": asked["recipe"], **facts}


def check_data(recipe: Recipe, ranks: int, modes: list[str]) -> None:
    """Raises RequestError, before anything starts, for data that is not there or is too small for the global batch."""
    from hpc_lbsgd.bench.core.timing import training_set
    from hpc_lbsgd.bench.scaling.measure import with_workers

    try:
        found = training_set(recipe)
    except RequestError as problem:
        raise RequestError(f"{problem}. Without data: --set data.train=null") from None
    for mode in modes:
        settled = with_workers(recipe, mode, ranks)
        kn = settled.batch.kn
        settled.build_schedule(kn if found is None else len(found))


# ---------------------------------------------------------------- measuring


def scaling(name: str, settings: list[str], request: Request) -> Path | None:
    """Measure; returns the folder that has the launches now, None on ranks that keep nothing."""
    world = worlds.from_environment()
    recipe = recipes.read(name, settings)
    counts = counts_of(request)
    if counts and world.size > 1:
        raise RequestError(
            f"this is rank {world.rank} of {world.size}: leave --ranks and --nodes out to measure these ranks, or "
            "start the command once, without mpirun or srun"
        )
    asked = question(Path(name).stem, recipe, counts or [world.size], request.modes)
    folder = Folder(request.out or Path("runs") / f"scaling-{Path(name).stem}")
    folder.check(asked)
    task = task_of(asked, request, 1 if counts else request.rounds)
    check_data(recipes.validate(asked["recipe"]), asked["ranks"][-1], task["modes"])
    if counts:
        across(folder, asked, task, request, counts)
    elif not here(folder, asked, task):
        return None
    return folder.path


def across(folder: Folder, asked: dict, task: dict, request: Request, counts: list[int]) -> None:
    """Launch all numbers of ranks in turn."""
    machine = dict(task["recipe"]["machine"])
    if task["recipe"]["determinism"] != "any-ranks":
        for key in ("threads", "loader_threads"):
            machine[key] = machine[key] or threads_of(request, counts)
    task = task | {"recipe": task["recipe"] | {"machine": machine}}
    folder.claim(asked)
    folder.forget(counts)
    contenders = [Contender(f"{n} rank{'s' * (n > 1)}", None, task, n) for n in counts]
    place = request.place._replace(folder=folder.path)
    rounds: dict[int, int] = {}
    limits = (request.rounds, request.timeout_s, request.oversubscribe)
    for who, result in launches.in_turn(PROGRAM, contenders, *limits, place=place):
        folder.add(rounds.get(who.ranks, 0), result)
        rounds[who.ranks] = rounds.get(who.ranks, 0) + 1


def here(folder: Folder, asked: dict, task: dict) -> bool:
    """Measure on the ranks that this process is one of; True on the one that kept the result."""
    from hpc_lbsgd.bench.scaling.measure import measure

    result = measure(task)
    if result is None:
        return False
    folder.claim(asked)
    folder.forget([result["ranks"]])
    folder.add(0, result)
    return True
