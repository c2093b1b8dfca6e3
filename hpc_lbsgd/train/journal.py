"""What a run writes down: one record for each thing that happens, on rank 0; other ranks' journals stay empty."""

from __future__ import annotations

import math
from collections.abc import Callable

from hpc_lbsgd import progress
from hpc_lbsgd.amend import said
from hpc_lbsgd.outline import outline, render
from hpc_lbsgd.records import Metrics, RunFolder, now, read_metrics, whole
from hpc_lbsgd.sections import OPTIMIZERS
from hpc_lbsgd.signals import say
from hpc_lbsgd.theory.schedule import Schedule
from hpc_lbsgd.train.callbacks import Callbacks, View
from hpc_lbsgd.train.display import Display
from hpc_lbsgd.train.environment import software_facts
from hpc_lbsgd.train.laps import Laps
from hpc_lbsgd.train.loggers import Loggers, TensorBoard
from hpc_lbsgd.train.parts import Parts
from hpc_lbsgd.train.prepare import Prepared
from hpc_lbsgd.train.services import Services
from hpc_lbsgd.train.step import Outcome


class Journal:
    """metrics.jsonl, with a display, loggers and callbacks that listen to it. `write` does nothing before `open`."""

    def __init__(self, folder: RunFolder):
        self.folder, self.metrics, self.callbacks = folder, None, None
        self.steps: list[tuple] = []  # of the epoch under way: loss, samples, seconds, replaced

    def listen(self, recipe, replica, ask: Callable[[], None]) -> None:
        """Make those who will listen. Rank 0 only, before `open`. ask: for the run's end at its next safe point.

        Raises RequestError for a logger or a callback that cannot start.
        """
        plain = recipe.model_dump(mode="json")
        view = View(self.folder.path, plain, replica, ask)
        self.callbacks = Callbacks(recipe.train.callbacks, view)
        services = Services(recipe.train.loggers, self.folder, plain)
        self.listeners = [Loggers([TensorBoard(self.folder.path / "tensorboard")]), self.callbacks, services]

    def asked(self) -> tuple[str | None, bool]:
        """(what went wrong in a callback, one has asked for the run to be done), on rank 0."""
        return (self.callbacks.fault, self.callbacks.finished) if self.callbacks else (None, False)

    def open(
        self, name: str, found: Prepared, recipe, schedule: Schedule, state, engine, ranks, parts: Parts, laps: Laps
    ) -> None:
        """Say what begins, and write it down. Rank 0 only. ranks: `environment_facts` of each."""
        first, plan = state.step, outline(recipe, schedule, engine.size)
        resumed = f", resumed at step {first}" if found.attempt else ""
        lines = [render(name, plan, recipe), f"  run folder     {self.folder.path}{resumed}"]
        for step, changes in found.amendments:
            lines.append(f"  amended        {said(step, changes)}")
        if recipe.optim.name not in OPTIMIZERS:
            lines.append(f"  optimizer      {parts.replica.optimizer}")
        if parts.checks:
            lines.append(f"  preflight      {len(parts.checks)} checks in {parts.preflight_s:.1f} s: all hold")
        lines += [f"  passed over    {note}" for note in found.notes]
        progress.note("\n".join(lines))
        if progress.quiet():
            for warning in plan["warnings"]:
                say(f"warning: {warning}")
        self.folder.add_environment({"time": now(), "attempt": found.attempt, **software_facts(), "ranks": ranks})
        # the steps of the epoch under way, for its mean: a resume may start in the middle
        epoch = schedule.at(min(first, schedule.full_steps - 1)).epoch
        there = filter(whole, read_metrics(self.folder.metrics))
        steps = (r for r in there if r["kind"] == "step" and r["epoch"] == epoch)
        self.steps = [
            (r["loss"], r["samples"], r["step_s"], r.get("replaced", 0)) for r in steps if not r.get("skipped")
        ]
        self.listeners.insert(0, Display(schedule, first, recipe.train.eval_epochs if found.eval_set else None))
        self.metrics = Metrics(self.folder, self.listeners)
        laps.end("open")
        self.write(
            "start",
            step=first,
            engine=engine.name,
            ranks=engine.size,
            attempt=found.attempt,
            global_batch=plan["global_batch"],
            workers=plan["workers"],
            steps=schedule.steps,
            device=ranks[0]["device"],
            recipe_fingerprint=state.recipe_fingerprint,
            data_fingerprint=state.data_fingerprint,
            preflight_s=round(parts.preflight_s, 3),
            start_s=laps.parts,
        )
        if found.attempt:
            self.event("resume", attempt=found.attempt, step=first, checkpoint=found.checkpoint)
        if found.amended:
            self.event("amendment", step=first, changes=dict(found.amendments)[first])

    def write(self, kind: str, **fields) -> None:
        if self.metrics:
            self.metrics.write(kind, **fields)

    def event(self, event: str, **fields) -> None:
        self.write("event", event=event, **fields)

    def flush(self) -> None:
        """Write down all there is."""
        if self.metrics:
            self.metrics.flush()

    def sync(self) -> None:
        """Write down all there is, and make it durable."""
        if self.metrics:
            self.metrics.sync()

    def make_durable(self) -> None:
        """What was written down so far. From any thread."""
        if self.metrics:
            self.metrics.make_durable()

    def step(self, outcome: Outcome, **more) -> None:
        point, seconds = outcome.point, outcome.step_s
        if outcome.replaced:
            more["replaced"] = outcome.replaced
        if outcome.flushed is not None:
            more["flushed"] = outcome.flushed
        if not outcome.finite:
            more["skipped"] = True
        if outcome.measurement:
            more |= {"noise_trace": outcome.measurement.trace, "noise_square": outcome.measurement.square}
        self.write(
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
            **more,
        )
        if outcome.finite and self.metrics:
            self.steps.append((outcome.loss, outcome.count, seconds, outcome.replaced))

    def epoch(self, step: int, epoch: int) -> None:
        """The epoch's mean loss and rate, over the steps that were taken."""
        samples, seconds, replaced = (sum(s[k] for s in self.steps) for k in (1, 2, 3))
        loss = sum(s[0] * s[1] for s in self.steps) / samples if samples else math.nan
        rate = {"samples": samples, "seconds": seconds, "images_per_s": samples / seconds if seconds else 0.0}
        if replaced:
            rate["replaced"] = replaced
        self.write("epoch", step=step, epoch=epoch, loss=loss, **rate)
        self.steps = []

    def close(self) -> None:
        if self.metrics:
            self.metrics.sync()
            for listener in self.listeners:
                listener.close()
            self.metrics.close()
