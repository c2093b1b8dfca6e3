"""Who else keeps a run's scalars: TensorBoard always, others by `train.loggers` and their own packages. All read the
same records, on rank 0; how to reach them is said to them in their own way (WANDB_MODE, MLFLOW_TRACKING_URI)."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import flatten
from hpc_lbsgd.records import RunFolder, metrics_of

OFTEN = ("loss", "lr", "global_batch", "images_per_s", "data_wait_s", "exposed_comm_s", "step_s")
RARE = ("noise_scale", "noise_scale_low", "noise_scale_high", "flushed", "replaced", "skipped")
EVAL = ("loss", "accuracy", "ema_loss", "ema_accuracy")
MLFLOW_PARAMS = 100  # it takes so many at once
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
    def end(self) -> None:
        """Nothing comes after this."""


class Loggers:
    """Listens to metrics records, and hands all loggers the same. One that fails in mid-run is left out: the records
    are in the run folder anyway."""

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers, self._next = loggers, 0.0

    def __call__(self, record: dict) -> None:
        step, kind = record.get("step"), record["kind"]
        if kind == "step":
            due = time.monotonic() >= self._next
            if due:
                self._next = time.monotonic() + EVERY_S
            self._send("train", record, (*OFTEN, *RARE) if due else RARE)
        elif kind == "eval":
            self._send("eval", record, (*EVAL, *metrics_of(record)))
        elif kind == "epoch":
            self._send("epoch", record, ("loss", "images_per_s"))
        elif kind == "event":
            rest = json.dumps({k: v for k, v in record.items() if k not in ("kind", "time", "event", "step")})
            self._each(lambda logger: logger.text(f"event/{record['event']}", rest, step))

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
        self._each(lambda logger: logger.end())


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

    def end(self) -> None:
        self.writer.close()


class Wandb(Logger):
    """Weights & Biases: a run of theirs a run of ours, which a resume goes on with."""

    name = "wandb"

    def __init__(self, folder: RunFolder, recipe: dict):
        import wandb

        where = {"dir": str(folder.path.absolute()), "name": folder.path.absolute().name}
        again = {"id": known(folder, self.name), "resume": "allow", "allow_val_change": True}
        self.run = wandb.init(config=recipe, **where, **again)
        remember(folder, self.name, self.run.id)

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def text(self, name: str, text: str, step: int | None) -> None:
        self.run.log({name: text}, step=step)

    def end(self) -> None:
        self.run.finish()


class Mlflow(Logger):
    """MLflow: a run of theirs a run of ours, which a resume goes on with."""

    name = "mlflow"

    def __init__(self, folder: RunFolder, recipe: dict):
        import mlflow

        self.mlflow, before = mlflow, known(folder, self.name)
        run = mlflow.start_run(run_id=before) if before else mlflow.start_run(run_name=folder.path.absolute().name)
        remember(folder, self.name, run.info.run_id)
        params = list(flatten(recipe).items()) if not before else []
        for i in range(0, len(params), MLFLOW_PARAMS):
            mlflow.log_params(dict(params[i : i + MLFLOW_PARAMS]))

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def text(self, name: str, text: str, step: int | None) -> None:
        self.mlflow.set_tag(f"{name}/{step}", text)

    def end(self) -> None:
        self.mlflow.end_run()


LOGGERS = {logger.name: logger for logger in (Wandb, Mlflow)}


def known(folder: RunFolder, name: str) -> str | None:
    """What a service calls this run, if an earlier start has met it."""
    return folder.read_loggers().get(name)


def remember(folder: RunFolder, name: str, theirs: str) -> None:
    folder.write_loggers({**folder.read_loggers(), name: theirs})


def refuse_missing(names: Iterable[str]) -> None:
    """Raise RequestError for a logger whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, which such packages leave behind
            raise RequestError(f"train.loggers = {name}: not installed (pip install {name})")


def open_all(names: Iterable[str], folder: RunFolder, recipe: dict) -> Loggers:
    """TensorBoard and those named. Raises RequestError for one that cannot start."""
    found: list[Logger] = []
    for name in names:
        try:
            found.append(LOGGERS[name](folder, recipe))
        except Exception as problem:  # whatever a package does where nobody has logged in, or no service answers
            Loggers(found).close()
            raise RequestError(f"train.loggers = {name}: {type(problem).__name__}: {problem}") from None
    return Loggers([TensorBoard(folder.path / "tensorboard"), *found])
