"""A run on one rank of many: prepare, loop, end."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import torch

from hpc_lbsgd import progress
from hpc_lbsgd.amend import recipe_now, schedule_of
from hpc_lbsgd.data.ahead import Cut
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RequestError, RunError
from hpc_lbsgd.parallel.agree import agree
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.signals import ENDING, say
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import checkpoint, crosscheck, decide, metrics, sets, verdict
from hpc_lbsgd.train.environment import environment_facts
from hpc_lbsgd.train.evaluate import evaluate
from hpc_lbsgd.train.interval import Interval
from hpc_lbsgd.train.journal import Journal
from hpc_lbsgd.train.laps import Laps
from hpc_lbsgd.train.parts import build, recompute
from hpc_lbsgd.train.prepare import Prepared, data_fingerprint
from hpc_lbsgd.train.replica import weights_sha256
from hpc_lbsgd.train.slow import SlowRanks
from hpc_lbsgd.train.step import Outcome, Passes, Stepper
from hpc_lbsgd.train.stops import Stops
from hpc_lbsgd.train.watchdog import LONG, Watchdog
from hpc_lbsgd.train.writer import Saved, Writer

CLAIM_S = 5.0  # for the record of a failure, before the job is ended


class Trainer:
    """All decisions come from sums that every rank has; only rank 0 writes."""

    def __init__(self, name: str, found: Prepared, engine, device: torch.device, stops: Stops, laps: Laps):
        self.name, self.found, self.engine, self.device, self.stops = name, found, engine, device, stops
        self.laps = laps
        self.written = Recipe.model_validate(found.recipe)  # as the run folder has it
        first = found.state["step"] if found.state else 0
        self.recipe = recipe = recipe_now(self.written, found.amendments, first)
        if recipe.machine.threads and device.type == "cpu":
            torch.set_num_threads(recipe.machine.threads)  # as the run's first start settled it
        self.folder = RunFolder(found.run)
        self.lead = engine.rank == 0
        self.journal = Journal(self.folder)
        self.train_set, self.eval_set = sets.open_all(recipe, (found.train_set, found.eval_set), engine)
        data = data_fingerprint(self.train_set, self.eval_set)
        sets.refuse_other(data, engine)
        fresh = checkpoint.State(0, self.written.fingerprint(), data, rules=checkpoint.RULES)
        self.state = checkpoint.State(**found.state) if found.state else fresh
        self._schedule_from_decisions()
        sets.foresee(self.train_set, self.eval_set, self.schedule, recipe.seed, self.state.step, engine)
        self.adaptive = recipe.schedule.kind == "adaptive-batch"
        self.first_step = self.state.step
        self.last_checkpoint = time.monotonic()
        self.interval, self.stall_s = Interval(recipe.checkpoint), 0.0
        self.due = False  # a checkpoint, in a step that is not read yet
        self.stepper: Stepper | None = None
        self.last_eval: dict = {}
        self.flushed_said = 0.0

    def run(self) -> int:
        """From the start to the end; returns the process's exit code. Collective."""
        try:
            self._prepare()
        except RequestError:
            self.watchdog.stop()
            raise
        started = time.monotonic()
        try:
            stopped = self._train()
            if self.first_step == self.state.step and self.eval_set and self.first_step:  # nothing was left to do
                self.last_eval = agree(self.engine, lambda: self.folder.evaluation(self.first_step))
                if not self.last_eval:
                    self._evaluate(self.schedule.at(self.first_step - 1).epoch + 1)
            return self._end(stopped, time.monotonic() - started)
        except RequestError as problem:  # on one rank, perhaps, and long after the request
            self._finish_writing()
            raise RunError(str(problem)) from None
        except (Exception, KeyboardInterrupt) as problem:
            if getattr(problem, "everywhere", False):
                if self.stepper:
                    self.stepper.drop()
                self.watchdog.stop()  # ranks leave one by one, and the first is not one that died
            if isinstance(problem, KeyboardInterrupt) and self.writer.busy:
                say(ENDING)
            self._finish_writing()
            raise

    # ---------------------------------------------------------------- prepare

    def _schedule_from_decisions(self) -> None:
        self.schedule = schedule_of(self.written, len(self.train_set), self.state.decisions, self.found.amendments)

    def _prepare(self) -> None:
        timeout_s = self.recipe.machine.stall_timeout_s
        self.watchdog = Watchdog(self.folder, self.engine.rank, self.engine.size, timeout_s, self._on_stall)
        begun = None if self.found.start_gone else agree(self.engine, self.folder.read_preflight)
        parts = build(self.recipe, self.schedule, self.train_set, self.eval_set, self.engine, self.device, begun)
        parts.refuse()
        self.laps.end("build")
        self.replica, self.train_loader, self.eval_loader = parts.replica, parts.train_loader, parts.eval_loader
        if self.found.checkpoint:
            agree(self.engine, lambda: checkpoint.load(Path(self.found.checkpoint), self.replica))
        self.replica.optimizer.skipped = len(self.state.skipped)
        self.replica.synchronise()
        self.replica.exponents = self.state.exponents
        ranks = self.engine.gather(environment_facts(self.device, self.replica.buckets.rounded_by))
        self.hosts, self.devices = [r["host"] for r in ranks], [r["device"] for r in ranks]
        self.slow = SlowRanks(self.hosts)
        agree(self.engine, lambda: self.journal.listen(self.recipe, self.replica, self.stops.ask))
        if self.lead:
            if parts.facts and not begun and not self.found.start_gone:
                self.folder.write_preflight(parts.facts)
            run = (self.name, self.found, self.recipe, self.schedule, self.state, self.engine)
            self.journal.open(*run, ranks, parts, self.laps)
            self.interval.nodes = len(set(self.hosts))
        limit_s = LONG["checkpoint"] * timeout_s
        keep = self.recipe.checkpoint.keep
        self.writer = Writer(self.folder, keep, limit_s, self._on_stuck, self.journal.make_durable)
        self.stops.watch(self.folder, self.lead)

    # ---------------------------------------------------------------- loop

    def _train(self) -> bool:
        """All steps that are left; True if the run was stopped on the way.

        An adaptive batch is decided at epoch ends, so its loader is asked for an epoch at a time.
        """
        partners = crosscheck.checkers(self.hosts)
        passes = Passes(self.recipe, self.engine.rank, self.engine.size, partners)
        while self.state.step < self.schedule.steps and not self.state.finished:
            start, end = self.state.step, self.schedule.steps
            if self.adaptive:
                end = min(end, self.schedule.first_step(self.schedule.at(start).epoch + 1))
            asked = Cut(passes.requests(self.schedule, self.recipe.seed, start, end))
            batches = self.train_loader.batches(asked)
            self.stepper = Stepper(self.replica, self.recipe, batches, self.watchdog.enter, partners)
            points = map(self.schedule.at, range(start, end))
            for outcome in self.stepper.outcomes(points, self._previous_lr, self._asked, self._settles):
                if self._follow(outcome):
                    self.stepper.drop()
                    return True
                if outcome.overflow:  # the same one again, from its first batch
                    asked.over = True
                    break
            for _ in batches:  # drains the loader
                pass
        return False

    def _asked(self) -> tuple[bool, bool]:
        """Of a step: whether the job is to stop after it, and whether a checkpoint is due, by what this rank knows."""
        since_s, waits = time.monotonic() - self.last_checkpoint, self.lead and not self.due
        self.due |= (due := waits and self.interval.due(since_s, self.writer.busy))
        return self.stops.asked(), due

    def _settles(self, number: int) -> bool:
        """Whether something follows a step, before the next one, that is known beforehand."""
        known = self._ends_epoch(self.schedule.at(number)) or self._saves(number + 1)
        return known or bool(self.recipe.train.callbacks)

    def _saves(self, done: int) -> bool:
        every = self.recipe.checkpoint.steps
        return every is not None and done % every == 0

    def _ends_epoch(self, point: Point) -> bool:
        return point.step + 1 == self.schedule.first_step(point.epoch + 1)

    def _follow(self, outcome: Outcome) -> bool:
        """What follows a step; True if the job is to stop here."""
        point = outcome.point
        self.due &= not outcome.checkpoint
        if outcome.mismatch:
            self._name_wrong_rank(point, outcome.mismatch)
        if outcome.overflow:
            self.journal.event("overflow", step=point.step, tensor=outcome.overflow[0], tensors=len(outcome.overflow))
            return False
        if not outcome.finite:
            self._pass_over(point, outcome)
        # All that decides the next step is settled before a checkpoint of this one is written.
        self.state.step = done = point.step + 1
        self._record(outcome)
        self._saved(self.writer.ended())
        epoch_ends = self._ends_epoch(point)
        if epoch_ends:
            self.journal.epoch(done, point.epoch)
            if self.adaptive and point.epoch + 1 < self.schedule.epochs:
                self._decide(point.epoch + 1)
        last, best = done == self.schedule.steps, False
        if self.eval_set and (last or (epoch_ends and (point.epoch + 1) % self.recipe.train.eval_epochs == 0)):
            best = self._evaluate(point.epoch + 1)
        if outcome.stop and self.recipe.train.callbacks:
            self.state.finished = self.engine.share(self.journal.asked())[1]
        if last or best or outcome.stop or outcome.checkpoint or self._saves(done):
            self._save()
        return outcome.stop and not last

    def _previous_lr(self, number: int) -> float:
        """The learning rate of the last step that was taken; 0: there was none."""
        taken = number - 1 - verdict.in_a_row(number, self.state.skipped)
        return self.schedule.at(taken).lr if taken >= 0 else 0.0

    def _record(self, outcome: Outcome) -> None:
        point, more = outcome.point, {}
        if outcome.measurement:
            self.state.noise = [*self.state.noise, outcome.measurement][-self.recipe.train.noise_scale_window :]
            scale = decide.noise_scale(self.recipe, self.state.noise)
            if scale:
                more = {"noise_scale": scale.value, "noise_scale_low": scale.low, "noise_scale_high": scale.high}
        self.journal.step(outcome, **more)
        for event, facts in self.slow.step(outcome.own_s, point.global_batch / self.engine.size):
            self.journal.event(event, step=point.step, **facts)
            if event == "slow":
                self.stops.for_spare()
        if outcome.flushed and outcome.flushed > max(verdict.FLUSHED_WARN, 2 * self.flushed_said):
            self._say_lost(point, outcome.flushed)

    def _decide(self, epoch: int) -> None:
        """An adaptive batch, logged, and kept in the next checkpoint."""
        measured = decide.noise_scale(self.recipe, self.state.noise)
        decision = decide.batch_from(self.recipe, self.schedule, epoch, measured)
        if decision is None:
            return
        self.state.decisions.append(decision)
        self._schedule_from_decisions()
        batch = decision.workers * self.recipe.batch.samples_per_worker
        facts = {**decision._asdict(), "global_batch": batch, "noise_scale": measured.value}
        self.journal.event("decision", step=self.state.step, **facts)

    def _evaluate(self, epochs: int) -> bool:
        """Evaluate after `epochs` epochs; True if it is the best so far."""
        recipe = self.recipe
        measured = metrics.of_recipe(recipe.train)

        def waits() -> None:  # an evaluation may take as long as it likes, but not where all wait for one another
            self.watchdog.enter("sum", self.state.step)

        def measure() -> dict:
            self.watchdog.enter("evaluation", self.state.step)
            of = (self.eval_loader, len(self.eval_set), recipe.machine.eval_batch)
            return evaluate(self.replica, *of, measured, waits)

        result = measure()
        if self.replica.average:
            self.replica.average.swap()
            average = measure()
            self.replica.average.swap()
            result |= {f"ema_{name}": value for name, value in average.items() if name != "samples"}
        self.last_eval = result
        self.journal.write("eval", step=self.state.step, epoch=epochs, **result)
        accuracy = result.get("ema_accuracy", result["accuracy"])
        score = -result["loss"] if accuracy is None else accuracy
        best = decide.is_best(score, self.state.best_score)
        if best:
            self.state.best_score, self.state.best_step = score, self.state.step
        return best

    def _save(self) -> None:
        before = time.perf_counter()
        self.watchdog.enter("sum", self.state.step)
        self.replica.check_others()
        self.replica.check_equal(f"checkpoint of step {self.state.step}")
        self.state.exponents = self.replica.exponents
        self.watchdog.enter("checkpoint", self.state.step)
        if self.lead:
            self.journal.flush()  # a checkpoint never knows of steps that are not on record
            self._saved(self.writer.save(self.replica, self.state))
            self.stall_s = time.perf_counter() - before
            self.interval.measured(self.stall_s)
        self.last_checkpoint = time.monotonic()

    def _saved(self, saved: Saved | None) -> None:
        """Write down that a checkpoint is whole."""
        if saved:
            facts = {"seconds": round(saved.seconds, 3), "stall_s": round(self.stall_s, 4), "bytes": saved.bytes}
            self.journal.write("checkpoint", step=saved.step, path=str(saved.path), **facts)

    def _wait_for_writer(self) -> None:
        """Until the last checkpoint is whole; other ranks wait for this one where they meet next."""
        self.watchdog.enter("checkpoint", self.state.step)
        self._saved(self.writer.wait())

    def _finish_writing(self) -> None:
        """What ends the run leaves the checkpoint under way whole, and all records. If that fails, it is said beside
        the cause."""
        try:
            self._wait_for_writer()
            self.journal.flush()
        except RunError as problem:
            print(f"hpc-lbsgd: {problem}", file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- steps that were not taken

    def _pass_over(self, point: Point, outcome: Outcome) -> None:
        """A step that is not finite or out of range changed nothing. The run goes on without it or ends, as
        train.on_bad_step says, the same on every rank."""
        skipped = self.state.skipped
        facts = {"step": point.step, "rank": outcome.bad_rank, "ranks": outcome.bad_ranks, "lr": point.lr}
        if verdict.may_skip(self.recipe.train, point.step, skipped):
            skipped.append(point.step)
            self.replica.optimizer.skipped = len(skipped)
            self.journal.event("skipped", **facts)
            return
        self.watchdog.enter("checkpoint", point.step)  # the write under way may take long, and so may reading it
        good = agree(self.engine, self.writer.last_good)  # a rank that left meanwhile would be one that died
        self.journal.event("non-finite", **facts)
        self._give_up(verdict.bad_step(self.recipe, point, outcome, skipped, self.hosts, good))

    def _say_lost(self, point: Point, flushed: float) -> None:
        """Gradients below what the wire can hold are lost, and nothing else shows it."""
        self.flushed_said, (key, bits) = flushed, verdict.unit(self.recipe, point.step)
        self.journal.event("underflow", step=point.step, flushed=flushed, **{key: bits})
        if flushed > verdict.FLUSHED_STOP and point.step == 0:
            self._give_up(verdict.lost(self.recipe, flushed))

    def _name_wrong_rank(self, point: Point, mismatch: crosscheck.Mismatch) -> None:
        """Two ranks computed different bits: both, and a third, decode and compute the worker again; the run ends."""
        rank, pair = self.engine.rank, mismatch.pair
        third = next((r for r in range(self.engine.size) if r not in (pair.owner, pair.checker)), None)
        mine = None
        if not mismatch.parted and rank in (pair.owner, pair.checker, third):
            mine = recompute(self.recipe, self.schedule, self.train_set, self.replica, point, pair.worker)
        again = {r: digest for r, digest in enumerate(self.engine.gather(mine)) if digest is not None}
        who = crosscheck.culprit(mismatch, again, lambda r: f"rank {r} on {self.hosts[r]} ({self.devices[r]})")
        self.journal.event("cross-check", step=point.step, worker=pair.worker, what=who)
        passing = ". So it looks where a sample changed on disk between two reads, too (hpc-lbsgd data verify)"
        self._give_up(
            f"step {point.step}, cross-check: {who}{passing if crosscheck.PASSING in who else ''}. The step was not "
            "taken. Start again with --resume without that node; one worker is compared at a time, so it may have been "
            "wrong for longer: go back to a checkpoint that you trust"
        )

    def _give_up(self, message: str) -> None:
        """End the run; every rank does, with the same message."""
        self.journal.sync()
        raise RunError(message, everywhere=True)

    def _on_stall(self, message: str, speaks: bool, hosts: list[str]) -> None:
        """From the watchdog's thread. One rank speaks for those alive, all of them end the job."""
        if speaks:
            print(f"hpc-lbsgd: {message}", file=sys.stderr, flush=True)
            # nothing says that it is the run's fault: a batch script queues the job again
            facts = {"rank": self.engine.rank, "host": socket.gethostname(), "crashed": True, "error": message}
            facts["stalest_hosts"] = hosts  # which it then leaves out
            # a file system that hangs would hang this too, and the job is to end
            claim = threading.Thread(target=self.folder.claim_failure, kwargs=facts, daemon=True)
            claim.start()
            claim.join(CLAIM_S)
        self.engine.abort(EXIT_FAILED)

    def _on_stuck(self, message: str) -> None:
        """From the writer's deadline: rank 0 alone writes."""
        self._on_stall(f"rank {self.engine.rank} on {socket.gethostname()}: {message}", True, [])

    # ---------------------------------------------------------------- end

    def _end(self, stopped: bool, seconds: float) -> int:
        self._wait_for_writer()
        self.watchdog.enter("sum", self.state.step)
        self.replica.check_others()
        self.replica.check_equal("end")
        stopped = not self._refuse_fault() and stopped
        if self.lead:  # the others wait for what callbacks do
            self.watchdog.enter("closing", self.state.step)
        digest = weights_sha256(self.replica.model) if self.lead else None
        status = "stopped" if stopped else "done"
        facts = {"weights_sha256": digest, **self.last_eval}
        self.journal.write("end", step=self.state.step, steps=self.state.step, seconds=seconds, status=status, **facts)
        self.watchdog.enter("sum", self.state.step)
        self.engine.barrier()
        self._refuse_fault()
        self.watchdog.enter("end", self.state.step)
        if self.lead:
            self.folder.write_status(status, step=self.state.step, **facts)
            self.journal.close()
            self._say_end(stopped, seconds)
        self.watchdog.stop()
        # srun and mpirun kill the other ranks when one exits non-zero; `launch` turns `stopped` into 75
        return EXIT_STOPPED if stopped and self.engine.size == 1 else EXIT_DONE

    def _refuse_fault(self) -> bool:
        """End as failed where a callback has; True if one has asked for the run to be done. Collective."""
        fault, finished = self.engine.share(self.journal.asked())
        if fault:
            self._give_up(fault)
        return finished

    def _say_end(self, stopped: bool, seconds: float) -> None:
        what = "stopped at a safe point; start it again with --resume" if stopped else "done"
        known = self.last_eval.get("accuracy") is not None
        accuracy = f", test accuracy {self.last_eval['accuracy']:.2%}" if known else ""
        progress.note(f"{what}: {self.state.step} steps{accuracy}, {seconds:.0f} s\nrun folder: {self.folder.path}")
