"""What is written to a run folder and read from it. Files are the interface: bar, `watch`, report, plots and
benchmarks all read these.

    recipe.yaml         the recipe, settled (k no longer `per_rank`)
    environment.json    versions, hosts, devices, job id; one entry a start
    classes.json        names of the classes, by label
    amendments.json     what `--amend` changed, by step; written before it takes effect
    loggers.json        what the services of `train.loggers` call this run
    preflight.json      digests of the first start's first batch and gradient; a resume must compute the same
    metrics.jsonl       one JSON object a line: kind = start|step|epoch|eval|checkpoint|event|end
    metrics.lost.jsonl  lines after the checkpoint that a resume went back to
    status.json         how the last start ended: done | stopped | failed
    checkpoints/        see train/checkpoint.py
    heartbeats/         one small file a rank, see train/watchdog.py
    stop                made by a person or a launcher: the run stops at a safe point (`touch RUN/stop`)
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from hpc_lbsgd.errors import RequestError, RunError

FLUSH_S = 1.0
# of an `eval` record; what else it has are metrics of the user's own
EVALUATED = ("kind", "time", "step", "epoch", "loss", "accuracy", "samples", "ema_loss", "ema_accuracy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """The whole file or the old one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # nodes may use the same numbers
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def appear(whole: Path, target: Path) -> None:
    """Give a finished file a second name, whole from its first moment. Raises FileExistsError where it is taken."""
    try:
        os.link(whole, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with open(target, "xb") as f:
            f.write(whole.read_bytes())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def what_to_do(problem: Exception) -> str:
    """About a disk that does not take what is written."""
    match getattr(problem, "errno", None):
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return "make the folder writable"
        case errno.EIO | errno.ESTALE:
            return "see that the file system works again"
        case _:
            return "make room"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def json_line(record: dict) -> str:
    """Strict JSON: a NaN or infinity becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean) + "\n"


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.lost = self.path / "metrics.lost.jsonl"
        self.status_file = self.path / "status.json"
        self.environment = self.path / "environment.json"
        self.preflight = self.path / "preflight.json"
        self.classes = self.path / "classes.json"
        self.amendments = self.path / "amendments.json"
        self.loggers = self.path / "loggers.json"
        self.checkpoints = self.path / "checkpoints"
        self.heartbeats = self.path / "heartbeats"
        self.stop_file = self.path / "stop"

    def exists(self) -> bool:
        """A run was started here before."""
        return self.recipe.exists()

    def status(self) -> dict | None:
        try:
            return json.loads(self.status_file.read_text())
        except (OSError, ValueError):
            return None

    def write_status(self, status: str, **facts) -> None:
        write_atomically(self.status_file, json.dumps({"status": status, "time": now(), **facts}, indent=1) + "\n")

    def claim_failure(self, **facts) -> None:
        """Write status failed, unless a rank that failed earlier has done so: the first exception is the cause."""
        whole = self.path / f".status.{socket.gethostname()}.{os.getpid()}"
        with contextlib.suppress(OSError):  # a full disk, perhaps: better no status than half of one
            try:
                whole.write_text(json.dumps({"status": "failed", "time": now(), **facts}, indent=1) + "\n")
                appear(whole, self.status_file)
            finally:
                whole.unlink(missing_ok=True)

    def clear_status(self) -> None:
        """Forget how the last start ended, and what it was asked."""
        self.status_file.unlink(missing_ok=True)
        self.stop_file.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Forget a first start that was refused before any step: the folder can be used again."""
        if self.metrics.exists() or self.checkpoints.exists():
            return  # it was no first start
        for path in (self.recipe, self.classes, self.loggers):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.heartbeats, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: it was there before
            self.path.rmdir()

    def read_amendments(self) -> object:
        """What the file of amendments holds (see `amend.checked`)."""
        try:
            return json.loads(self.amendments.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as problem:
            raise RequestError(f"{self.amendments}: {problem}") from None

    def write_amendments(self, amendments: list[list]) -> None:
        write_atomically(self.amendments, json.dumps(amendments, indent=1) + "\n")

    def read_loggers(self) -> dict:
        """What each service calls this run."""
        try:
            return dict(json.loads(self.loggers.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def write_loggers(self, theirs: dict) -> None:
        write_atomically(self.loggers, json.dumps(theirs, indent=1) + "\n")

    def read_preflight(self) -> dict | None:
        """What the first start's preflight computed, or None."""
        try:
            return json.loads(self.preflight.read_text())
        except (OSError, ValueError):
            return None

    def write_preflight(self, facts: dict) -> None:
        write_atomically(self.preflight, json.dumps(facts, indent=1) + "\n")

    def evaluation(self, step: int) -> dict:
        """What was measured after `step` steps; empty where nothing was."""
        found = [r for r in filter(whole, read_metrics(self.metrics)) if r["kind"] == "eval" and r["step"] == step]
        return {k: v for k, v in found[-1].items() if k not in ("kind", "time", "step", "epoch")} if found else {}

    def newest_step(self) -> int:
        """Steps done at the newest checkpoint, as LATEST says; 0: there is none."""
        try:
            return int((self.checkpoints / "LATEST").read_text().strip().removeprefix("step-"))
        except (OSError, ValueError):
            return 0

    def is_saving(self) -> bool:
        """A checkpoint is being written, or was when its writer was killed (the next start removes it)."""
        return any(self.checkpoints.glob(".step-*"))

    def starts(self) -> list[dict]:
        """What each start ran on that came as far as its first step."""
        try:
            found = json.loads(self.environment.read_text())
        except (OSError, ValueError):
            return []
        known = isinstance(found, list) and all(isinstance(s, dict) for s in found)
        return found if known else []

    def home(self) -> Path | None:
        """The folder that the last start was made in: the recipe's relative paths are from there. None where that is
        not known, or gone."""
        starts = self.starts()
        found = Path(starts[-1].get("folder") or "") if starts else Path()
        return found if found.is_absolute() and found.is_dir() else None

    def add_environment(self, facts: dict) -> None:
        write_atomically(self.environment, json.dumps([*self.starts(), facts], indent=1) + "\n")


class Metrics:
    """Appends records to metrics.jsonl and hands them to listeners (progress bar, TensorBoard)."""

    def __init__(self, folder: RunFolder, listeners: list = ()):
        self._file = open(folder.metrics, "ab", buffering=0)  # noqa: SIM115 - lives as long as the run
        self._waiting: list[str] = []
        self._listeners = list(listeners)
        self._flushed = time.monotonic()

    def write(self, kind: str, **fields) -> None:
        """Raises RunError where the file cannot grow; it ends with a whole line then."""
        record = {"kind": kind, "time": now(), **fields}
        self._waiting.append(json_line(record))
        if kind != "step" or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()
            self._flushed = time.monotonic()
        for listener in self._listeners:
            listener(record)

    def flush(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        lines = memoryview("".join(self._waiting).encode())
        self._waiting = []
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError as problem:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise RunError(
                f"{self._file.name} cannot be written: {problem.strerror}; {what_to_do(problem)} and start again with "
                "--resume"
            ) from None

    def sync(self) -> None:
        """Make everything written so far durable."""
        self.flush()
        self.make_durable()

    def make_durable(self) -> None:
        """What has reached the file. Any thread may call it while another one writes."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict]:
    """The records of a metrics file; a line that a kill cut short, or a disk changed, is left out."""
    try:
        with open(path, "rb") as f:
            for line in f:
                record = record_of(line)
                if record is not None:
                    yield record
    except FileNotFoundError:
        return


def record_of(line: bytes) -> dict | None:
    """A line's record: it has a kind, and a step that counts (`start` of old runs had none)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step", 0)) is int
    return record if known else None


EVENTS_OF_A_STEP = ("skipped", "overflow", "underflow")  # and a resume before it meets them again


def metrics_of(record: dict) -> dict[str, float]:
    """The user's own metrics in an `eval` record, by name."""
    return {k: v for k, v in record.items() if k not in EVALUATED and type(v) in (int, float)}


NEEDED = {  # of a record, to be told of and gone on from
    "start": ("step", "ranks"),
    "step": ("step", "epoch", "loss", "lr", "global_batch", "samples", "step_s", "data_wait_s", "exposed_comm_s"),
    "eval": ("step", "epoch", "loss"),
    "event": ("event",),
}


def whole(r: dict) -> bool:
    """A record has what a resume, pages and views read of it: those of old versions, or of a damaged file, may not."""
    try:
        seconds_of(r["time"])
    except (KeyError, TypeError, ValueError):
        return False
    return all(key in r for key in NEEDED.get(r["kind"], ()))


def seconds_of(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def cut_metrics(folder: RunFolder, step: int) -> int:
    """Go back to the state after `step` steps: later records move to metrics.lost.jsonl. Returns how many moved.

    A step record numbers the step it reports, as events of that step do; the others count steps done.
    """
    kept, lost = [], []
    for record in read_metrics(folder.metrics):
        of_step = record["kind"] == "step" or record.get("event") in EVENTS_OF_A_STEP
        after = record.get("step", -1) >= step if of_step else record.get("step", -1) > step
        (lost if after or record["kind"] == "end" else kept).append(record)
    if lost:
        with open(folder.lost, "a", encoding="utf-8") as f:
            f.writelines(json_line(r) for r in lost)
            f.flush()
            os.fsync(f.fileno())
    write_atomically(folder.metrics, "".join(json_line(r) for r in kept))
    return len(lost)
