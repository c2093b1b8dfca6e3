"""What keepers of scalars are told: TensorBoard here, services of `train.loggers` in services.py. All are told the
same, for it follows from the records alone."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from hpc_lbsgd.records import metrics_of, seconds_of

OFTEN = ("loss", "lr", "global_batch", "images_per_s", "data_wait_s", "exposed_comm_s", "step_s")
RARE = ("noise_scale", "noise_scale_low", "noise_scale_high", "flushed", "replaced", "skipped")
EVAL = ("loss", "accuracy", "ema_loss", "ema_accuracy")
EVERY_S = 1.0  # what each step has, for events cost time


class Logger(ABC):
    """Where scalars and events are kept."""

    name: str
    lost = False  # it failed, and is left out

    @abstractmethod
    def scalars(self, values: dict[str, float], step: int) -> None:
        """Keep values by name, such as train/loss."""

    @abstractmethod
    def text(self, name: str, text: str, step: int | None) -> None:
        """Keep an event."""

    @abstractmethod
    def end(self, status: str) -> None:
        """Nothing comes after this. status: how the run ended: done, stopped or failed."""


class Loggers:
    """Listens to metrics records, and hands all loggers the same. One that fails in mid-run is left out: the records
    are in the run folder anyway."""

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers, self.status, self._next = loggers, None, 0.0

    def __call__(self, record: dict) -> None:
        step, kind = record.get("step"), record["kind"]
        if kind == "step":
            now = seconds_of(record["time"])
            due = now >= self._next
            if due:
                self._next = now + EVERY_S
            self._send("train", record, (*OFTEN, *RARE) if due else RARE)
        elif kind == "eval":
            self._send("eval", record, (*EVAL, *metrics_of(record)))
        elif kind == "epoch":
            self._send("epoch", record, ("loss", "images_per_s"))
        elif kind == "event":
            rest = json.dumps({k: v for k, v in record.items() if k not in ("kind", "time", "event", "step")})
            self._each(lambda logger: logger.text(f"event/{record['event']}", rest, step))
        elif kind == "end":
            self.status = record["status"]

    def _send(self, group: str, record: dict, keys: Iterable[str]) -> None:
        values = {f"{group}/{key}": float(record[key]) for key in keys if record.get(key) is not None}
        if values:
            self._each(lambda logger: logger.scalars(values, record["step"]))

    def _each(self, work: Callable[[Logger], None]) -> None:
        for logger in self.loggers:
            try:
                if not logger.lost:
                    work(logger)
            except Exception as problem:  # a service that is away must not end a run
                logger.lost = True
                said = f"{logger.name} is left out from here on: {type(problem).__name__}: {problem}"
                print(f"hpc-lbsgd: {said}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._each(lambda logger: logger.end(self.status or "failed"))


class TensorBoard(Logger):
    name = "TensorBoard"

    def __init__(self, folder):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int | None) -> None:
        self.writer.add_text(name, text, step)

    def end(self, status: str) -> None:
        self.writer.close()
