"""A run from its first step to its end, on one rank of many: step, record, evaluate, decide, checkpoint."""

from __future__ import annotations

import math
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data import stage as stages
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RequestError, RunError
from hpc_lbsgd.outline import outline, render
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import agree, together
from hpc_lbsgd.recipe import Decision, Recipe
from hpc_lbsgd.records import Metrics, RunFolder, now, read_metrics
from hpc_lbsgd.theory import noise
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.display import Display, TensorBoard
from hpc_lbsgd.train.evaluate import evaluate
from hpc_lbsgd.train.losses import loss_function
from hpc_lbsgd.train.parts import build
from hpc_lbsgd.train.prepare import Prepared, data_fingerprint, environment_facts, software_facts, stage_folder
from hpc_lbsgd.train.step import Outcome, Passes, Stepper
from hpc_lbsgd.train.watchdog import Watchdog

STOP_FILE_EVERY_S = 1.0  # a look at a parallel file system is not free
# Shares of gradients that fixed point makes zero: from where it is said, and from where a run is not begun
FLUSHED_WARN, FLUSHED_STOP = 0.01, 0.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # not USR1, which NCCL may take


class Trainer:
    """All decisions come from sums that every rank has; only rank 0 writes."""

    def __init__(self, name: str, found: Prepared, engine, device: torch.device):
        self.name, self.found, self.engine, self.device = name, found, engine, device
        self.recipe = recipe = Recipe.model_validate(found.recipe)
        if recipe.machine.threads and device.type == "cpu":
            torch.set_num_threads(recipe.machine.threads)  # as the run's first start settled it
        self.folder = RunFolder(found.run)
        self.lead = engine.rank == 0
        sets = (found.train_set, found.eval_set)
        self.train_set, self.eval_set = together(
            engine, lambda: [loaders.open_set(recipe, path) if path else None for path in sets]
        )
        folder = together(engine, lambda: stage_folder(recipe))
        if folder:
            self._stage(folder)
        fresh = checkpoint.State(0, recipe.fingerprint(), data_fingerprint(self.train_set, self.eval_set))
        self.state = checkpoint.State(**found.state) if found.state else fresh
        self._schedule_from_decisions()
        self.adaptive = recipe.schedule.kind == "adaptive-batch"
        self.first_step = self.state.step
        self.stop_asked = False
        self.looked_for_stop_file = time.monotonic()
        self.last_checkpoint = time.monotonic()
        self.last_eval: dict = {}
        self.flushed_said = 0.0

    def _stage(self, folder: str) -> None:
        """Read packed sets from node-local copies: the first rank of each node makes them, the others wait."""
        first = worlds.from_environment().local_rank == 0
        sets = [self.train_set, self.eval_set]
        staged = [i for i, s in enumerate(sets) if isinstance(s, Manifest) and s.shards]
        if first:
            for i in staged:
                stages.stage(sets[i], folder, show=self.lead)
        self.engine.barrier()
        for i in staged:
            sets[i] = Manifest(stages.folder_of(sets[i], folder) / FILE_NAME)
        self.train_set, self.eval_set = sets

    def _schedule_from_decisions(self) -> None:
        decisions = [Decision(*d) for d in self.state.decisions]
        self.schedule = self.recipe.build_schedule(len(self.train_set), decisions)

    # ---------------------------------------------------------------- the run

    def run(self) -> int:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        machine = self.recipe.machine
        self.watchdog = Watchdog(
            self.folder, self.engine.rank, self.engine.size, machine.stall_timeout_s, self._on_stall
        )
        self._build()
        if self.found.checkpoint:
            agree(self.engine, lambda: checkpoint.load(Path(self.found.checkpoint), self.replica))
        self.replica.optimizer.skipped = len(self.state.skipped)
        self.replica.synchronise()
        self._open_records()
        started = time.monotonic()
        stopped = self._train()
        if self.first_step == self.state.step and self.eval_set and self.first_step:
            self._evaluate(self.schedule.at(self.first_step - 1).epoch + 1)  # nothing was left to do
        return self._end(stopped, time.monotonic() - started)

    def _build(self) -> None:
        begun = agree(self.engine, self.folder.read_preflight)
        sets = (self.train_set, self.eval_set)
        try:
            parts = build(self.recipe, self.schedule, *sets, self.engine, self.device, begun)
            parts.refuse()
        except RequestError:
            self.watchdog.stop()
            raise
        self.replica, self.train_loader, self.eval_loader = parts.replica, parts.train_loader, parts.eval_loader
        self.preflight = parts
        if self.lead and parts.facts and not begun:
            self.folder.write_preflight(parts.facts)

    def _train(self) -> bool:
        """All steps that are left; True if the run was stopped on the way.

        An adaptive batch is decided at epoch ends, so its loader is asked for an epoch at a time.
        """
        passes = Passes(self.recipe, self.engine.rank, self.engine.size)
        while self.state.step < self.schedule.steps:
            start, end = self.state.step, self.schedule.steps
            if self.adaptive:
                end = min(end, self.schedule.first_step(self.schedule.at(start).epoch + 1))
            batches = self.train_loader.batches(passes.requests(self.schedule, self.recipe.seed, start, end))
            stepper = Stepper(self.replica, self.recipe, batches, self._mark)
            for number in range(start, end):
                if self._step(stepper, number):
                    return True
            next(batches, None)  # drains the loader
        return False

    def _step(self, stepper: Stepper, number: int) -> bool:
        """One step and what follows it; True if the job is to stop here."""
        point = self.schedule.at(number)
        before = time.perf_counter()
        minutes = self.recipe.checkpoint.minutes
        due = self.lead and minutes is not None and time.monotonic() - self.last_checkpoint > 60 * minutes
        self._look_for_stop_file()
        outcome = stepper.run(point, self._previous_lr(number), self.stop_asked, due)
        if not outcome.finite:
            self._refuse(point, outcome)
        # All that decides the next step is settled before a checkpoint of this one is written.
        self.state.step = done = number + 1
        self._record(point, outcome, time.perf_counter() - before)
        epoch_ends = done == self.schedule.first_step(point.epoch + 1)
        if epoch_ends:
            self._write_epoch(point.epoch)
            if self.adaptive and point.epoch + 1 < self.schedule.epochs:
                self._decide(point.epoch + 1)
        last = done == self.schedule.steps
        best = False
        if self.eval_set and (last or (epoch_ends and (point.epoch + 1) % self.recipe.train.eval_epochs == 0)):
            best = self._evaluate(point.epoch + 1)
        steps = self.recipe.checkpoint.steps
        if last or best or outcome.stop or outcome.checkpoint or (steps and done % steps == 0):
            self._save()
        return outcome.stop and not last

    def _previous_lr(self, number: int) -> float:
        """The learning rate of the last step that was taken; 0: there was none."""
        taken = number - 1
        while taken in self.state.skipped:
            taken -= 1
        return self.schedule.at(taken).lr if taken >= 0 else 0.0

    def _evaluate(self, epochs: int) -> bool:
        """Evaluate after `epochs` epochs; True if it is the best so far."""
        self.watchdog.enter("evaluation", self.state.step)
        recipe = self.recipe

        def measure() -> dict:
            return evaluate(
                self.replica,
                self.eval_loader,
                len(self.eval_set),
                recipe.machine.eval_batch,
                loss_function(recipe.train.model_copy(update={"label_smoothing": 0.0})),
            )

        result = measure()
        if self.replica.average:
            self.replica.average.swap()
            average = measure()
            self.replica.average.swap()
            result |= {"ema_loss": average["loss"], "ema_accuracy": average["accuracy"]}
        self.last_eval = result
        self._write("eval", step=self.state.step, epoch=epochs, **result)
        accuracy = result.get("ema_accuracy", result["accuracy"])
        score = -result["loss"] if accuracy is None else accuracy
        best = self.state.best_score is None or score > self.state.best_score
        if best:
            self.state.best_score, self.state.best_step = score, self.state.step
        return best

    def _decide(self, epoch: int) -> None:
        """The batch from `epoch` on, from the noise scale measured so far (McCandlish et al. 2018, eq. D.6).

        Pure in (recipe, step, measurements), which every rank has; logged, and kept in the next checkpoint.
        """
        s, n = self.recipe.schedule, self.recipe.batch.samples_per_worker
        measured = self._noise_scale()
        if epoch < self.schedule.warmup.epochs or measured is None or measured.value is None:
            return
        now_stage = self.schedule.stages[-1]
        largest = self.recipe.max_workers() or len(self.train_set) // n
        wanted = round(noise.adaptive_batch(measured.value, s.noise_factor) / n)
        workers = min(max(wanted, self.recipe.batch.workers), largest)
        if workers == now_stage.workers:
            return
        lr = {
            "keep": now_stage.lr,
            "linear": now_stage.lr * workers / now_stage.workers,
            "noise": noise.transferred_lr(now_stage.lr, now_stage.workers * n, workers * n, measured.value),
        }[s.lr_on_batch_change]
        self.state.decisions.append([epoch, workers, lr])
        self._schedule_from_decisions()
        self._write(
            "event",
            event="decision",
            step=self.state.step,
            epoch=epoch,
            workers=workers,
            global_batch=workers * n,
            lr=lr,
            noise_scale=measured.value,
        )

    def _noise_scale(self) -> noise.NoiseScale | None:
        window = self.state.noise[-self.recipe.train.noise_scale_window :]
        return noise.noise_scale([noise.Measurement(*m) for m in window])

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
        status = "stopped" if stopped else "done"
        facts = {"weights_sha256": digest, **self.last_eval}
        self._write("end", step=self.state.step, steps=self.state.step, seconds=seconds, status=status, **facts)
        self.engine.barrier()
        if self.lead:
            self.folder.write_status(status, step=self.state.step, **facts)
            self.metrics.sync()
            for listener in self.listeners:
                listener.close()
            self.metrics.close()
            self._say_end(stopped, seconds)
        self.watchdog.stop()
        # srun and mpirun kill the other ranks when one exits non-zero; `launch` turns `stopped` into 75
        return EXIT_STOPPED if stopped and self.engine.size == 1 else EXIT_DONE

    # ---------------------------------------------------------------- records

    def _open_records(self) -> None:
        ranks = self.engine.gather(environment_facts(self.device))
        self.hosts = [r["host"] for r in ranks]
        if not self.lead:
            return
        recipe, first = self.recipe, self.first_step
        plan = outline(recipe, self.schedule, self.engine.size)
        print(render(self.name, plan, recipe), file=sys.stderr)
        resumed = f", resumed at step {first}" if self.found.attempt else ""
        print(f"  run folder     {self.folder.path}{resumed}", file=sys.stderr, flush=True)
        if self.preflight.checks:
            checks, seconds = self.preflight.checks, self.preflight.preflight_s
            print(f"  preflight      {len(checks)} checks in {seconds:.1f} s: all hold", file=sys.stderr, flush=True)
        for note in self.found.notes:
            print(f"  passed over    {note}", file=sys.stderr)
        self.folder.add_environment({"time": now(), "attempt": self.found.attempt, **software_facts(), "ranks": ranks})
        # the steps of the epoch under way, for its mean: a resume may start in the middle
        epoch = self.schedule.at(min(first, self.schedule.full_steps - 1)).epoch
        steps = (r for r in read_metrics(self.folder.metrics) if r["kind"] == "step" and r["epoch"] == epoch)
        self.epoch_steps = [
            (r["loss"], r["samples"], r["step_s"], r.get("replaced", 0)) for r in steps if not r.get("skipped")
        ]
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
            preflight_s=round(self.preflight.preflight_s, 3),
        )
        if self.found.attempt:
            facts = {"attempt": self.found.attempt, "step": first, "checkpoint": self.found.checkpoint}
            self._write("event", event="resume", **facts)

    def _record(self, point: Point, outcome: Outcome, seconds: float) -> None:
        extra = {"replaced": outcome.replaced} if outcome.replaced else {}
        if not outcome.finite:
            extra["skipped"] = True
        if outcome.flushed is not None:
            extra["flushed"] = outcome.flushed
            self._warn_of_underflow(point, outcome.flushed)
        if outcome.measurement:
            self.state.noise = [*self.state.noise, list(outcome.measurement)][-self.recipe.train.noise_scale_window :]
            extra |= {"noise_trace": outcome.measurement.trace, "noise_square": outcome.measurement.square}
            scale = self._noise_scale()
            if scale:
                extra |= {"noise_scale": scale.value, "noise_scale_low": scale.low, "noise_scale_high": scale.high}
        self._write(
            "step",
            step=point.step,
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
            **extra,
        )
        if self.lead and outcome.finite:
            self.epoch_steps.append((outcome.loss, outcome.count, seconds, outcome.replaced))

    def _warn_of_underflow(self, point: Point, flushed: float) -> None:
        """Gradients below the unit of fixed point are lost, and nothing else shows it."""
        if flushed > max(FLUSHED_WARN, 2 * self.flushed_said):
            self.flushed_said = flushed
            bits = self.recipe.fixed_point_bits
            self._write("event", event="underflow", step=point.step, flushed=flushed, fixed_point_bits=bits)
            if flushed > FLUSHED_STOP and point.step == 0:
                self.watchdog.stop()
                raise RunError(
                    f"step 0: {flushed:.0%} of the gradients that are not zero are below 2^-{bits + 1}, and "
                    f"determinism any-ranks makes them zero: raise fixed_point_bits (now {bits}, at most 52), or scale "
                    "the loss up and the learning rate down",
                    everywhere=True,
                )

    def _write_epoch(self, epoch: int) -> None:
        if self.lead:
            samples, seconds, replaced = (sum(s[k] for s in self.epoch_steps) for k in (1, 2, 3))
            loss = sum(s[0] * s[1] for s in self.epoch_steps) / samples if samples else math.nan
            rate = {"samples": samples, "seconds": seconds, "images_per_s": samples / seconds if seconds else 0.0}
            if replaced:
                rate["replaced"] = replaced
            self._write("epoch", step=self.state.step, epoch=epoch, loss=loss, **rate)
            self.epoch_steps = []

    def _mark(self, phase: str, number: int) -> None:
        compiling = self.recipe.machine.compile != "none" and number == self.first_step
        self.watchdog.enter("compile" if compiling else phase, number)

    def _write(self, kind: str, **fields) -> None:
        if self.lead:
            self.metrics.write(kind, **fields)

    def _refuse(self, point: Point, outcome: Outcome) -> None:
        """A step that is not finite or out of range changed nothing. The run goes on without it or ends, as
        train.on_bad_step says, the same on every rank."""
        train, skipped = self.recipe.train, self.state.skipped
        where = self._where(outcome)
        facts = {"step": point.step, "rank": outcome.bad_rank, "ranks": outcome.bad_ranks, "lr": point.lr}
        in_a_row = 1
        while point.step - in_a_row in skipped:
            in_a_row += 1
        if train.on_bad_step == "skip" and in_a_row <= train.bad_steps_limit:
            skipped.append(point.step)
            self.replica.optimizer.skipped = len(skipped)
            self._write("event", event="skipped", **facts)
            return
        newest = checkpoint.find_newest(self.folder)
        good = f"last good checkpoint: {newest[0]}" if newest else "no checkpoint was written yet"
        more = f"; {train.bad_steps_limit} steps before it were skipped (train.bad_steps_limit)" if in_a_row > 1 else ""
        self._write("event", event="non-finite", **facts)
        if self.lead:
            self.metrics.sync()
        self.watchdog.stop()
        raise RunError(
            f"step {point.step} (epoch {point.epoch + 1}): {where}{more}. The step was not taken; {good}. "
            + self._advice(point, outcome),
            everywhere=True,
        )

    def _where(self, outcome: Outcome) -> str:
        """What was wrong, and on which ranks."""
        what = "loss or gradient is not finite"
        if self.recipe.determinism == "any-ranks":
            what += f", or beyond the range of fixed_point_bits = {self.recipe.fixed_point_bits}"
        if outcome.bad_ranks == 1:
            return f"{what}, on rank {outcome.bad_rank} on {self.hosts[outcome.bad_rank]}"
        if outcome.bad_ranks:
            return f"{what}, on {outcome.bad_ranks} ranks"
        return "the sum of gradients over ranks is not finite (each rank's loss was)"

    def _advice(self, point: Point, outcome: Outcome) -> str:
        recipe = self.recipe
        if recipe.wire == "fp16" and not outcome.bad_ranks:
            return (
                "Gradients times 2^wire_scale_bits leave float16's range (65504): lower wire_scale_bits "
                f"(now {recipe.wire_scale_bits}), or set wire = fp32"
            )
        lower = f"Try a lower optim.base_lr (learning rate now {point.lr:g}) or a longer schedule.warmup_epochs"
        if recipe.determinism == "any-ranks":
            lower += "; or, where gradients and BatchNorm's statistics are finite but large, a lower fixed_point_bits"
        return lower

    def _say_end(self, stopped: bool, seconds: float) -> None:
        what = "stopped at a safe point; start it again with --resume" if stopped else "done"
        known = self.last_eval.get("accuracy") is not None
        accuracy = f", test accuracy {self.last_eval['accuracy']:.2%}" if known else ""
        print(
            f"{what}: {self.state.step} steps{accuracy}, {seconds:.0f} s\nrun folder: {self.folder.path}",
            file=sys.stderr,
            flush=True,
        )

    # ---------------------------------------------------------------- what comes from outside

    def _on_signal(self, number: int, frame) -> None:
        if self.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_asked = True  # acted upon at the next step's sum, by all ranks together

    def _look_for_stop_file(self) -> None:
        """Not every launcher passes signals on to its ranks."""
        if self.lead and time.monotonic() - self.looked_for_stop_file > STOP_FILE_EVERY_S:
            self.looked_for_stop_file = time.monotonic()
            self.stop_asked = self.stop_asked or self.folder.stop_file.exists()

    def _on_stall(self, message: str, speaks: bool) -> None:
        """From the watchdog's thread. One rank speaks for those alive, all of them end the job."""
        if speaks:
            print(f"hpc-lbsgd: {message}", file=sys.stderr, flush=True)
            self.folder.claim_failure(rank=self.engine.rank, host=socket.gethostname(), error=message)
        self.engine.abort(EXIT_FAILED)
