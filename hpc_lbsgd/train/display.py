"""What a person sees on rank 0 while a run goes: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from shutil import get_terminal_size

from tqdm import tqdm

from hpc_lbsgd.progress import quiet
from hpc_lbsgd.records import metrics_of
from hpc_lbsgd.theory.schedule import Schedule

LINE_EVERY_S = 10.0
WINDOW = 50  # steps that rates are averaged over
SHORTEST = 8  # columns of the bar itself
BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"


def duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Display:
    """Listens to metrics records and shows them."""

    def __init__(self, schedule: Schedule, first_step: int, eval_epochs: int | None, stream=None):
        """eval_epochs: a run evaluates every so many epochs; None: never."""
        self.stream = stream or sys.stderr
        self.schedule, self.steps, self.epochs, self.eval_epochs = (
            schedule,
            schedule.steps,
            schedule.epochs,
            eval_epochs,
        )
        self.recent: deque[dict] = deque(maxlen=WINDOW)
        self.bar = None
        if self.stream.isatty() and not quiet():
            self.bar = tqdm(
                total=self.steps, initial=first_step, file=self.stream, dynamic_ncols=True, bar_format=BAR, leave=True
            )
        self._next_line = 0.0
        self._eval_s, self._last = 0.0, time.monotonic()

    def __call__(self, record: dict) -> None:
        getattr(self, f"_{record['kind']}", lambda r: None)(record)
        self._last = time.monotonic()

    def _say(self, text: str, always: bool = False) -> None:
        if quiet() and not always:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def _step(self, r: dict) -> None:
        self.recent.append(r)
        seconds = sum(x["step_s"] for x in self.recent)
        rate = sum(x["samples"] for x in self.recent) / seconds
        wait = sum(x["data_wait_s"] for x in self.recent) / seconds
        epoch, loss = f"epoch {r['epoch'] + 1}/{self.epochs}", f"loss {r['loss']:.4f}"
        schedule, speed = (
            (f"lr {r['lr']:.4g}", f"kn {r['global_batch']}"),
            (f"{rate:.0f} images/s", f"data wait {wait:.1%}"),
        )
        eta = f"ETA {duration(self._left_s(r, rate))}"
        if self.bar is not None:
            said = [eta, loss, epoch, *speed, *schedule]  # a narrow terminal has no room for the last of them
            room = get_terminal_size().columns - len(f"100% |{SHORTEST * '#'}| {self.steps}/{self.steps}, ")
            while len(said) > 1 and len(", ".join(said)) > room:
                said.pop()
            self.bar.set_postfix_str(", ".join(said), refresh=False)
            self.bar.update(1)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            self._say("  ".join([epoch, f"step {r['step'] + 1}/{self.steps}", loss, *schedule, *speed, eta]))

    def _left_s(self, r: dict, rate: float) -> float:
        """Until the end, in seconds: samples that are left at the rate of late, whatever the batch will be, and the
        evaluations that are left."""
        samples = self.schedule.samples_ahead(r["step"] + 1)
        evaluations = 0.0
        if self.eval_epochs and samples:
            evaluations = 1 + samples / self.schedule.samples / self.eval_epochs
        return samples / rate + int(evaluations) * self._eval_s

    def _eval(self, r: dict) -> None:
        self._eval_s = time.monotonic() - self._last
        accuracy = "" if r["accuracy"] is None else f"test accuracy {r['accuracy']:.2%}  "
        if r.get("ema_accuracy") is not None:
            accuracy += f"of averaged weights {r['ema_accuracy']:.2%}  "
        accuracy += "".join(f"{name} {value:.4g}  " for name, value in metrics_of(r).items())
        self._say(f"epoch {r['epoch']}/{self.epochs}  test loss {r['loss']:.4f}  {accuracy}({r['samples']} samples)")

    def _epoch(self, r: dict) -> None:
        if r.get("replaced"):
            self._say(f"epoch {r['epoch'] + 1}: {r['replaced']} images could not be read; others stood in for them")

    def _checkpoint(self, r: dict) -> None:
        self._say(f"checkpoint at step {r['step']}: {r['path']}")

    def _event(self, r: dict) -> None:
        details = ", ".join(f"{k} {v}" for k, v in r.items() if k not in ("kind", "time", "event"))
        self._say(f"{r['event']}: {details}", always=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
