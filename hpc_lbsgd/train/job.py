"""`train`: one process of a job, from MPI's start to its exit code."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from hpc_lbsgd import progress
from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, RequestError, RunError
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.parallel import gpus
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import agree, together
from hpc_lbsgd.parallel.memory import keep_freed_memory
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.runs import RUNS, own_run
from hpc_lbsgd.signals import undisturbed
from hpc_lbsgd.train import compiling
from hpc_lbsgd.train.alike import refuse_unlike
from hpc_lbsgd.train.laps import Laps
from hpc_lbsgd.train.parts import build
from hpc_lbsgd.train.preflight import Check
from hpc_lbsgd.train.prepare import Prepared, check_own, open_data, prepare, with_start_settled
from hpc_lbsgd.train.stops import Stops
from hpc_lbsgd.train.trainer import Trainer


def train(
    name: str,
    recipe: Recipe,
    run: str | None = None,
    resume: str | None = None,
    as_json: bool = False,
    amend: dict | None = None,
    stops: Stops | None = None,
    laps: Laps | None = None,
    settle: Callable[..., Prepared] = prepare,
    trainer: Callable[..., Trainer] = Trainer,
) -> int:
    """Train `recipe` on all ranks of this job; returns the process's exit code.

    name: of the recipe, for the run folder (default: runs/NAME-TIME). resume: as for `choose_run`. as_json: rank 0
    prints how the run ended as one JSON object. stops: listening already (default: from now on). laps: what the start
    has taken so far. settle, trainer: other ones for what is trained otherwise. Collective: every rank calls it.
    """
    laps = laps or Laps()
    if stops is None:
        stops = Stops(worlds.from_environment().size == 1)
        stops.listen()
    device, engine = meet(recipe)
    stops.listen()  # again: MPI takes SIGHUP for itself
    laps.end("engine")
    folder = chosen = held = None
    where = f"rank {engine.rank} on {socket.gethostname()}"

    def lost(message: str) -> None:  # from the lease's thread: another start writes to the folder, this one no more
        print(f"hpc-lbsgd: {message}", file=sys.stderr, flush=True)
        engine.abort(EXIT_FAILED)

    def begin() -> Prepared:
        nonlocal chosen, held
        with undisturbed():
            chosen, held = own_run(name, run, resume, lost)
        return settle(chosen, recipe, engine.size, engine.cores, amend, device)

    try:
        refuse_shared(engine.gather(place_of(device)))
        refuse_unlike(engine, recipe)
        found = agree(engine, begin)
        folder = RunFolder(found.run)
        laps.end("prepare")
        code = trainer(name, found, engine, device, stops, laps).run()
        if as_json and engine.rank == 0:
            print(json.dumps({"run": found.run, **folder.status()}), flush=True)
        engine.close()
        return code
    except RequestError as problem:  # on every rank alike: `agree` and `together` see to it
        if engine.rank == 0:
            if folder is not None and found.attempt == 0:
                folder.abandon()
            progress.raised(problem)
            print(f"hpc-lbsgd: {problem}", file=sys.stderr)
        engine.close()
        return EXIT_REQUEST
    except RunError as problem:
        if problem.everywhere:
            if engine.rank == 0:
                folder.claim_failure(rank=0, host=socket.gethostname(), error=str(problem))
                progress.raised(problem)
                print(f"hpc-lbsgd: {problem}", file=sys.stderr)
            engine.close()
            return EXIT_FAILED
        fail(engine, folder, where, str(problem))
    except KeyboardInterrupt:
        if engine.size > 1:
            fail(engine, folder, where, "ended by Ctrl-C")
        if chosen is not None:
            chosen.abandon()  # it had not begun, perhaps
            if chosen.exists():
                chosen.claim_failure(rank=0, host=socket.gethostname(), error="ended by Ctrl-C")
        raise
    except BaseException as problem:
        fail(engine, folder, where, f"{type(problem).__name__}: {problem}", traceback.format_exc())
    finally:
        if held:
            held.release()
    return EXIT_FAILED


def preflight(recipe: Recipe, as_json: bool = False) -> int:
    """Check model, data and ranks of `recipe` without training; returns the process's exit code: 1 where a check fails.
    Collective, as `train`."""
    device, engine = meet(recipe)

    def request() -> tuple[dict, str, str | None]:
        # the folder is for manifests of data that cannot be written beside
        check_own(recipe)
        asked = with_start_settled(recipe.with_workers(engine.size))
        train, evaluation, settled = open_data(asked, RunFolder(RUNS / "preflight"))
        content = compiling.settle(settled, device).model_dump(mode="json")
        return content, str(train.path), str(evaluation.path) if evaluation is not None else None

    seconds = 0.0
    try:
        refuse_shared(engine.gather(place_of(device)))
        content, *paths = agree(engine, request)
        settled = Recipe.model_validate(content)
        sets = together(engine, lambda: [path and loaders.open_set(settled, path) for path in paths])
        schedule = together(engine, lambda: settled.build_schedule(len(sets[0])))
    except RequestError as problem:
        if engine.rank == 0:
            progress.raised(problem)
            print(f"hpc-lbsgd: {problem}", file=sys.stderr)
        engine.close()
        return EXIT_REQUEST
    try:
        parts = build(settled, schedule, *sets, engine, device, None)
        checks, seconds = parts.checks, parts.preflight_s
    except RequestError as problem:
        checks = [Check("start", False, str(problem))]
    if engine.rank == 0:
        if as_json:
            print(json.dumps({"checks": [c._asdict() for c in checks], "seconds": round(seconds, 3)}))
        else:
            for c in checks:
                print(f"{'ok    ' if c.ok else 'FAILED'}  {c.check:8s} {c.what}")
    engine.close()
    return EXIT_DONE if all(c.ok for c in checks) else EXIT_FAILED


def fail(engine, folder: RunFolder | None, where: str, message: str, trace: str = "") -> None:
    """One rank cannot go on: say so, leave a record, and end all ranks (a job of one rank just ends)."""
    print(f"{trace}hpc-lbsgd: {where}: {message}", file=sys.stderr, flush=True)
    if folder is not None:
        folder.claim_failure(rank=engine.rank, host=socket.gethostname(), error=message)
    if engine.size > 1:
        engine.abort(EXIT_FAILED)


def meet(recipe) -> tuple[torch.device, engines.Engine]:
    """What a rank settles before it computes, and its engine. Collective."""
    device = prepare_process(recipe)
    engine = engines.create(recipe.machine, recipe.determinism, device)
    if device.type == "cpu":
        # the number of threads changes the order of sums inside a kernel
        default = 1 if recipe.determinism == "any-ranks" else engine.cores
        torch.set_num_threads(recipe.machine.threads or default)
    return device, engine


def prepare_process(recipe) -> torch.device:
    """What a rank settles before MPI starts: its memory, its device, its kernels. recipe: its determinism and precision
    are looked at."""
    keep_freed_memory()
    device = choose_device(worlds.from_environment())
    configure_torch(recipe)
    return device


def choose_device(world: worlds.World) -> torch.device:
    """The GPU of this rank's place on its node, or the CPU where there is none. Where each rank sees one GPU alone
    (--gpus-per-task, jsrun), that one; `refuse_shared` finds out whether it is its own."""
    if not torch.cuda.is_available():
        if problem := gpus.lost():  # on the CPU it would train for days without a word
            raise RequestError(f"rank {world.rank} on {socket.gethostname()}: {problem}")
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if 1 < visible <= world.local_rank:
        raise RequestError(
            f"rank {world.rank} is the {world.local_rank + 1}th on its node, which shows {visible} GPUs: start at most "
            "one rank a GPU, and let every rank see all GPUs of its node, or one of its own"
        )
    device = torch.device("cuda", 0 if visible == 1 else world.local_rank)
    torch.cuda.set_device(device)
    return device


def refuse_shared(places: Sequence[tuple[str, str | None]]) -> None:
    """Raise RequestError where two ranks have one GPU. places: (host, identity of the GPU; None: no GPU) by rank."""
    first: dict[tuple[str, str | None], int] = {}
    for rank, place in enumerate(places):
        if place[1] is not None and first.setdefault(place, rank) != rank:
            raise RequestError(
                f"ranks {first[place]} and {rank} on {place[0]} have the same GPU: start at most one rank a GPU"
            )


def place_of(device: torch.device) -> tuple[str, str | None]:
    """For `refuse_shared`."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return socket.gethostname(), uuid and str(uuid)


def configure_torch(recipe) -> None:
    exact = recipe.determinism != "off"
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # use_deterministic_algorithms(True) in two parts: it would import torch's compiler, to tell it
        torch.set_deterministic_debug_mode("error")
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
        # filling what `empty` returns with NaN finds kernels that read it; it makes nothing deterministic
        torch.utils.deterministic.fill_uninitialized_memory = False
    cudnn = torch.backends.cudnn
    cudnn.benchmark = not exact
    # of convolutions torch's own default is tf32, whatever the recipe says
    tf32, matmul = recipe.precision == "tf32", torch.backends.cuda.matmul
    # the old words, too, and first: where they say something else, reading one raises (torch.export, cudnn.flags)
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    # each by itself: one that somebody has set (cudnn.allow_tf32) no longer follows cudnn
    for backend in (cudnn, cudnn.conv, cudnn.rnn, matmul):
        backend.fp32_precision = "tf32" if tf32 else "ieee"
