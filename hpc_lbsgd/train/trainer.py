"""A run from its first step to its end, on one rank of many."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED, RequestError, RunError
from hpc_lbsgd.outline import outline, render
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import Metrics, RunFolder, now
from hpc_lbsgd.train import checkpoint, step
from hpc_lbsgd.train.display import Display, TensorBoard
from hpc_lbsgd.train.evaluate import evaluate
from hpc_lbsgd.train.prepare import Prepared, data_fingerprint, environment_facts, prepare, software_facts
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.watchdog import Watchdog

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # not USR1, which NCCL may take


def train(name: str, recipe: Recipe, run: str | None = None, resume: bool = False, as_json: bool = False) -> int:
    """Train `recipe` on all ranks of this job; returns the process's exit code.

    name: of the recipe, for the run folder (default: runs/NAME-TIME). as_json: rank 0 prints how the run ended as
    one JSON object. Collective: every rank calls it.
    """
    world = worlds.from_environment()
    device = choose_device(world)
    configure_torch(recipe, world, device)
    engine = engines.create(recipe.machine, recipe.determinism, device)
    folder = None
    try:
        found = agree(engine, lambda: prepare(name, recipe, run, resume, engine.size))
        folder = RunFolder(found.run)
        code = Trainer(name, found, engine, device).run()
        if as_json and engine.rank == 0:
            print(json.dumps({"run": found.run, **folder.status()}), flush=True)
        engine.close()
        return code
    except RequestError as problem:  # on every rank alike: `agree` saw to it
        if engine.rank == 0:
            print(f"hpc-lbsgd: {problem}", file=sys.stderr)
        engine.close()
        return EXIT_REQUEST
    except RunError as problem:
        where = f"rank {engine.rank} on {socket.gethostname()}"
        if problem.everywhere:
            if engine.rank == 0:
                folder.claim_failure(rank=0, host=socket.gethostname(), error=str(problem))
                print(f"hpc-lbsgd: {problem}", file=sys.stderr)
            engine.close()
            return EXIT_FAILED
        fail(engine, folder, where, str(problem))
    except BaseException as problem:
        fail(
            engine,
            folder,
            f"rank {engine.rank} on {socket.gethostname()}",
            f"{type(problem).__name__}: {problem}",
            traceback.format_exc(),
        )
    return EXIT_FAILED


def fail(engine, folder: RunFolder | None, where: str, message: str, trace: str = "") -> None:
    """One rank cannot go on: say so, leave a record, and end all ranks (a job of one rank just ends)."""
    print(f"{trace}hpc-lbsgd: {where}: {message}", file=sys.stderr, flush=True)
    if folder is not None:
        folder.claim_failure(rank=engine.rank, host=socket.gethostname(), error=message)
    if engine.size > 1:
        engine.abort(EXIT_FAILED)


def agree(engine, work: Callable):
    """Rank 0's result of `work` on every rank; if it raises RequestError there, every rank does."""
    verdict = None
    if engine.rank == 0:
        try:
            verdict = ("ok", work())
        except RequestError as problem:
            verdict = ("refused", str(problem))
    kind, value = engine.share(verdict)
    if kind == "refused":
        raise RequestError(value)
    return value


def together(engine, work: Callable):
    """`work` on every rank; if it raises RequestError on some of them, all ranks raise it and name those."""
    result = problem = None
    try:
        result = work()
    except RequestError as found:
        problem = f"rank {engine.rank} on {socket.gethostname()}: {found}" if engine.rank else str(found)
    problems = [p for p in engine.gather(problem) if p]
    if problems:
        raise RequestError(problems[0] + (f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""))
    return result


def choose_device(world: worlds.World) -> torch.device:
    """The GPU of this rank's place on its node, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() <= world.local_rank:
        raise RequestError(
            f"rank {world.rank} is the {world.local_rank + 1}th on its node, which shows "
            f"{torch.cuda.device_count()} GPUs: start at most one rank a GPU, and let every rank see all "
            "GPUs of its node (--gpus-per-node, not --gpus-per-task)"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def configure_torch(recipe: Recipe, world: worlds.World, device: torch.device) -> None:
    exact = recipe.determinism != "off"
    if device.type == "cpu":
        # the number of threads changes the order of sums inside a kernel
        default = 1 if recipe.determinism == "any-ranks" else worlds.cores_per_rank(world.local_size)
        torch.set_num_threads(recipe.machine.threads or default)
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not exact


class Trainer:
    """The loop: step, record, evaluate, checkpoint; all decisions from sums that every rank has."""

    def __init__(self, name: str, found: Prepared, engine, device: torch.device):
        self.name, self.found, self.engine, self.device = name, found, engine, device
        self.recipe = Recipe.model_validate(found.recipe)
        self.folder = RunFolder(found.run)
        self.lead = engine.rank == 0
        self.train_manifest, self.eval_manifest = together(
            engine, lambda: [Manifest(Path(p)) if p else None for p in (found.train_manifest, found.eval_manifest)]
        )
        self.schedule = self.recipe.build_schedule(len(self.train_manifest))
        self.state = (
            checkpoint.State(**found.state)
            if found.state
            else checkpoint.State(
                0, self.recipe.fingerprint(), data_fingerprint(self.train_manifest, self.eval_manifest)
            )
        )
        self.stop_asked = False
        self.last_checkpoint = time.monotonic()
        self.last_eval: dict = {}

    # ---------------------------------------------------------------- the run

    def run(self) -> int:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        self.watchdog = Watchdog(
            self.folder, self.engine.rank, self.engine.size, self.recipe.machine.stall_timeout_s, self._on_stall
        )
        classes = len(self.train_manifest.classes)
        self.replica = together(self.engine, lambda: Replica(self.recipe, classes, self.engine, self.device))
        if self.found.checkpoint:
            agree(self.engine, lambda: checkpoint.load(Path(self.found.checkpoint), self.replica))
        self.replica.synchronise()
        self._open_records()
        first = self.first_step = self.state.step
        together(self.engine, self._make_loaders)
        requests = step.requests(
            self.schedule,
            self.recipe.seed,
            self.engine.rank,
            self.engine.size,
            self.recipe.machine.workers_per_pass,
            first,
            self.schedule.steps,
        )
        stepper = step.Stepper(self.replica, self.recipe, self.train_loader.batches(requests), self._mark)
        started = time.monotonic()
        stopped = False
        for number in range(first, self.schedule.steps):
            stopped = self._step(stepper, number)
            if stopped:
                break
        if first >= self.schedule.steps and self.eval_manifest:
            self._evaluate(self.schedule.at(first - 1).epoch + 1)
        return self._end(stopped, time.monotonic() - started)

    def _step(self, stepper: step.Stepper, number: int) -> bool:
        """One step and what follows it; True if the job is to stop here."""
        point = self.schedule.at(number)
        before = time.perf_counter()
        minutes = self.recipe.checkpoint.minutes
        due = self.lead and minutes is not None and time.monotonic() - self.last_checkpoint > 60 * minutes
        outcome = stepper.run(point, self.stop_asked, due)
        if not outcome.finite:
            self._refuse(point, outcome)
        seconds = time.perf_counter() - before
        self._write(
            "step",
            step=number,
            epoch=point.epoch,
            loss=outcome.loss,
            lr=point.lr,
            momentum=point.momentum,
            global_batch=point.global_batch,
            samples=outcome.count,
            images_per_s=outcome.count / seconds,
            data_wait_s=outcome.data_wait_s,
            exposed_comm_s=outcome.exposed_comm_s,
            step_s=seconds,
        )
        self.state.step = done = number + 1
        last = done == self.schedule.steps
        epoch_ends = done == self.schedule.first_step(point.epoch + 1)
        best = False
        every = self.recipe.train.eval_epochs
        if self.eval_manifest and (last or (epoch_ends and (point.epoch + 1) % every == 0)):
            best = self._evaluate(point.epoch + 1)
        steps = self.recipe.checkpoint.steps
        if last or best or outcome.stop or outcome.checkpoint or (steps and done % steps == 0):
            self._save()
        return outcome.stop and not last

    def _evaluate(self, epochs: int) -> bool:
        """Evaluate after `epochs` epochs; True if it is the best so far."""
        self.watchdog.enter("evaluation", self.state.step)
        result = evaluate(
            self.replica,
            self.eval_loader,
            len(self.eval_manifest),
            self.recipe.machine.eval_batch,
            self.recipe.precision,
        )
        self.last_eval = result
        self._write("eval", step=self.state.step, epoch=epochs, **result)
        best = self.state.best_accuracy is None or result["accuracy"] > self.state.best_accuracy
        if best:
            self.state.best_accuracy, self.state.best_step = result["accuracy"], self.state.step
        return best

    def _save(self) -> None:
        self.watchdog.enter("checkpoint", self.state.step)
        if self.lead:
            before = time.perf_counter()
            path = self.folder.checkpoints / checkpoint.name_of(self.state.step)
            self._write("checkpoint", step=self.state.step, path=str(path))
            self.metrics.sync()
            checkpoint.save(self.folder, self.replica, self.state, self.recipe.checkpoint.keep)
            self._write("event", event="saved", step=self.state.step, seconds=round(time.perf_counter() - before, 3))
        self.last_checkpoint = time.monotonic()

    def _end(self, stopped: bool, seconds: float) -> int:
        self.watchdog.enter("end", self.state.step)
        digest = self.replica.check_equal("end")
        self._write(
            "end",
            step=self.state.step,
            steps=self.state.step,
            weights_sha256=digest,
            seconds=seconds,
            status="stopped" if stopped else "done",
            **{k: self.last_eval[k] for k in ("accuracy",) if k in self.last_eval},
        )
        self.engine.barrier()
        if self.lead:
            status = "stopped" if stopped else "done"
            self.folder.write_status(status, step=self.state.step, weights_sha256=digest, **self.last_eval)
            self.metrics.sync()
            for listener in self.listeners:
                listener.close()
            self.metrics.close()
            self._say_end(stopped, seconds)
        self.watchdog.stop()
        # srun and mpirun kill the other ranks when one exits non-zero; `launch` turns `stopped` into 75
        return EXIT_STOPPED if stopped and self.engine.size == 1 else EXIT_DONE

    # ---------------------------------------------------------------- parts

    def _make_loaders(self) -> None:
        recipe, machine = self.recipe, self.recipe.machine
        threads = machine.loader_threads or min(8, worlds.cores_per_rank(self.engine.local_size))
        shared = (threads, machine.prefetch, self.replica.channels_last, self.device)
        self.train_loader = loaders.create(
            recipe.data,
            self.train_manifest,
            recipe.seed,
            True,
            recipe.batch.samples_per_worker * machine.workers_per_pass,
            *shared,
        )
        if self.eval_manifest:
            self.eval_loader = loaders.create(
                recipe.data, self.eval_manifest, recipe.seed, False, machine.eval_batch, *shared
            )

    def _open_records(self) -> None:
        ranks = self.engine.gather(environment_facts(self.device))
        self.hosts = [r["host"] for r in ranks]
        if not self.lead:
            return
        recipe, first = self.recipe, self.state.step
        plan = outline(recipe, self.schedule, self.engine.size)
        print(render(self.name, plan, recipe), file=sys.stderr)
        print(
            f"  run folder     {self.folder.path}" + (f", resumed at step {first}" if self.found.attempt else ""),
            file=sys.stderr,
            flush=True,
        )
        for note in self.found.notes:
            print(f"  passed over    {note}", file=sys.stderr)
        self.folder.add_environment({"time": now(), "attempt": self.found.attempt, **software_facts(), "ranks": ranks})
        self.listeners = [
            Display(self.schedule.steps, first, self.schedule.epochs),
            TensorBoard(self.folder.path / "tensorboard"),
        ]
        self.metrics = Metrics(self.folder, self.listeners)
        self._write(
            "start",
            step=first,
            engine=self.engine.name,
            ranks=self.engine.size,
            attempt=self.found.attempt,
            global_batch=plan["global_batch"],
            workers=plan["workers"],
            device=ranks[0]["device"],
            recipe_fingerprint=recipe.fingerprint(),
            data_fingerprint=self.state.data_fingerprint,
        )
        if self.found.attempt:
            self._write(
                "event", event="resume", attempt=self.found.attempt, step=first, checkpoint=self.found.checkpoint
            )

    def _mark(self, phase: str, number: int) -> None:
        compiling = self.recipe.machine.compile != "none" and number == self.first_step
        self.watchdog.enter("compile" if compiling else phase, number)

    def _write(self, kind: str, **fields) -> None:
        if self.lead:
            self.metrics.write(kind, **fields)

    def _refuse(self, point, outcome: step.Outcome) -> None:
        """A non-finite step: nothing was updated; the run ends with what a person needs to know."""
        if outcome.bad_ranks == 1:
            where = f"rank {outcome.bad_rank} on {self.hosts[outcome.bad_rank]}"
        elif outcome.bad_ranks:
            where = f"{outcome.bad_ranks} ranks"
        else:
            where = "the sum over ranks (each rank's loss was finite)"
        newest = checkpoint.find_newest(self.folder)
        good = f"last good checkpoint: {newest[0]}" if newest else "no checkpoint was written yet"
        what = "loss or gradient is not finite"
        if self.recipe.determinism == "any-ranks":
            what += f", or beyond the range of fixed_point_bits = {self.recipe.fixed_point_bits}"
        message = (
            f"step {point.step} (epoch {point.epoch + 1}): {what}, on {where}. The step was not taken; {good}. "
            f"Try a lower optim.base_lr (learning rate now {point.lr:g}) or a longer schedule.warmup_epochs"
        )
        self._write("event", event="non-finite", step=point.step, rank=outcome.bad_rank, ranks=outcome.bad_ranks)
        if self.lead:
            self.metrics.sync()
        self.watchdog.stop()
        raise RunError(message, everywhere=True)

    def _say_end(self, stopped: bool, seconds: float) -> None:
        what = "stopped at a safe point; start it again with --resume" if stopped else "done"
        accuracy = f", test accuracy {self.last_eval['accuracy']:.2%}" if self.last_eval else ""
        print(
            f"{what}: {self.state.step} steps{accuracy}, {seconds:.0f} s\nrun folder: {self.folder.path}",
            file=sys.stderr,
            flush=True,
        )

    def _on_signal(self, number: int, frame) -> None:
        if self.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_asked = True  # acted upon at the next step's sum, by all ranks together

    def _on_stall(self, message: str, speaks: bool) -> None:
        """From the watchdog's thread. One rank speaks for those alive, all of them end the job."""
        if speaks:
            print(f"hpc-lbsgd: {message}", file=sys.stderr, flush=True)
            self.folder.claim_failure(rank=self.engine.rank, host=socket.gethostname(), error=message)
        self.engine.abort(EXIT_FAILED)
