"""What a person sees on rank 0 while a run goes: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque

from tqdm import tqdm

LINE_EVERY_S = 10.0
WINDOW = 50  # steps that rates are averaged over


def duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Display:
    """Listens to metrics records and shows them."""

    def __init__(self, steps: int, first_step: int, epochs: int, stream=None):
        self.stream = stream or sys.stderr
        self.steps, self.epochs = steps, epochs
        self.recent: deque[dict] = deque(maxlen=WINDOW)
        self.bar = None
        if self.stream.isatty():
            self.bar = tqdm(
                total=steps, initial=first_step, unit="step", file=self.stream, dynamic_ncols=True, smoothing=0.05
            )
        self._next_line = 0.0

    def __call__(self, record: dict) -> None:
        getattr(self, f"_{record['kind']}", lambda r: None)(record)

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def _step(self, r: dict) -> None:
        self.recent.append(r)
        seconds = sum(x["step_s"] for x in self.recent)
        rate = sum(x["samples"] for x in self.recent) / seconds
        wait = sum(x["data_wait_s"] for x in self.recent) / seconds
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(
                f"epoch {r['epoch'] + 1}/{self.epochs} loss {r['loss']:.4f} lr {r['lr']:.4g} "
                f"kn {r['global_batch']} {rate:.0f} images/s data {wait:.1%}",
                refresh=False,
            )
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            left = (self.steps - r["step"] - 1) * seconds / len(self.recent)
            self._say(
                f"epoch {r['epoch'] + 1}/{self.epochs}  step {r['step'] + 1}/{self.steps}  loss {r['loss']:.4f}  "
                f"lr {r['lr']:.4g}  kn {r['global_batch']}  {rate:.0f} images/s  data wait {wait:.1%}  "
                f"ETA {duration(left)}"
            )

    def _eval(self, r: dict) -> None:
        accuracy = "" if r["accuracy"] is None else f"test accuracy {r['accuracy']:.2%}  "
        if r.get("ema_accuracy") is not None:
            accuracy += f"of averaged weights {r['ema_accuracy']:.2%}  "
        self._say(f"epoch {r['epoch']}/{self.epochs}  test loss {r['loss']:.4f}  {accuracy}({r['samples']} samples)")

    def _epoch(self, r: dict) -> None:
        if r.get("replaced"):
            self._say(f"epoch {r['epoch'] + 1}: {r['replaced']} images could not be read; others stood in for them")

    def _checkpoint(self, r: dict) -> None:
        self._say(f"checkpoint at step {r['step']}: {r['path']}")

    def _event(self, r: dict) -> None:
        details = ", ".join(f"{k} {v}" for k, v in r.items() if k not in ("kind", "time", "event"))
        self._say(f"{r['event']}: {details}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class TensorBoard:
    """Listens to metrics records and writes scalars; at most one step a second, for events cost time."""

    def __init__(self, folder):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        self._next = 0.0

    def __call__(self, record: dict) -> None:
        if record["kind"] == "step" and time.monotonic() >= self._next:
            self._next = time.monotonic() + 1.0
            for key in ("loss", "lr", "global_batch", "images_per_s", "data_wait_s", "step_s", "noise_scale"):
                if record.get(key) is not None:
                    self.writer.add_scalar(f"train/{key}", record[key], record["step"])
        elif record["kind"] == "eval":
            for key in ("loss", "accuracy", "ema_loss", "ema_accuracy"):
                if record.get(key) is not None:
                    self.writer.add_scalar(f"eval/{key}", record[key], record["step"])

    def close(self) -> None:
        self.writer.close()
