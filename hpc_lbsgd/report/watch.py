"""`watch RUN`: a run as it goes, from its records. A view that is drawn again on a terminal, lines elsewhere."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections import deque

from hpc_lbsgd import amend
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.owner import at_work
from hpc_lbsgd.recipe import Decision
from hpc_lbsgd.records import RunFolder, metrics_of, seconds_of, whole
from hpc_lbsgd.report.facts import NO_END
from hpc_lbsgd.schedulers import known
from hpc_lbsgd.schedulers.scheduler import HIDDEN
from hpc_lbsgd.tail import Tail
from hpc_lbsgd.train.display import duration

RECENT = 50  # steps that speed and waits are averaged over
HISTORY = 2000  # steps that the sparkline shows
EVENTS = 4  # of the newest
BARS = "▁▂▃▄▅▆▇█"
SHORTEST = 4  # columns of a bar
SILENT_S = 60.0  # without a record: said
JOB_EVERY_S, JOB_TIMEOUT_S = 30.0, 10.0
OWNER_EVERY_S = 10.0  # the batch system may have to be asked
PLAIN_EVERY_S = 10.0  # a line, where there is no terminal
RUNNING = "running"


class Live:
    """What a run's records say now."""

    def __init__(self, folder: RunFolder):
        if not folder.exists():
            raise RequestError(f"{folder.path}: no run (no recipe.yaml in it)")
        self.folder, self.tail = folder, Tail(folder.metrics, self.forget)
        self._job: tuple[float, str | None] = (-JOB_EVERY_S, None)
        self._owner: tuple[float, bool] = (-math.inf, True)  # when it was asked for, and whether it is at work
        self.forget()

    def forget(self) -> None:
        """Know nothing: the run went back, and its records come again."""
        self.recent: deque[dict] = deque(maxlen=RECENT)
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.events: deque[dict] = deque(maxlen=EVENTS)
        self.newest: dict[str, dict] = {}  # the last record of each kind
        self.best: float | None = None
        self.decisions: list[list] = []
        self.done = 0  # steps

    def look(self) -> None:
        """Take in what was written since."""
        for r in filter(whole, self.tail()):
            self.newest[r["kind"]] = r
            if r["kind"] == "start":
                self.done = r["step"]
            elif r["kind"] == "step":
                self.done = r["step"] + 1
                self.recent.append(r)
                if r.get("loss") is not None:
                    self.losses.append(r["loss"])
            elif r["kind"] == "eval":
                score = r.get("ema_accuracy", r.get("accuracy"))
                if score is not None:
                    self.best = score if self.best is None else max(self.best, score)
            elif r["kind"] == "event":
                if r["event"] == "decision":
                    self.decisions.append([r["epoch"], r["workers"], r["lr"]])
                self.events.append(r)

    def facts(self) -> dict:
        """For scripts, and for `lines`: numbers in their units, null where nothing is known yet."""
        seconds = sum(r["step_s"] for r in self.recent)
        mean = {k: sum(r[k] for r in self.recent) / seconds if seconds else None
                for k in ("samples", "data_wait_s", "exposed_comm_s")}  # fmt: skip
        step = self.newest.get("step", {})
        steps, epochs, left = self.length()
        status = self.status()
        last = max((seconds_of(r["time"]) for r in self.newest.values()), default=None)
        evaluated = self.newest.get("eval", {})
        return {
            "run": str(self.folder.path),
            "status": status,
            "step": self.done,
            "steps": steps,
            "epoch": step.get("epoch"),
            "epochs": epochs,
            "loss": step.get("loss"),
            "lr": step.get("lr"),
            "global_batch": step.get("global_batch"),
            "noise_scale": next((r["noise_scale"] for r in reversed(self.recent) if r.get("noise_scale")), None),
            "images_per_s": mean["samples"],
            "data_wait_share": mean["data_wait_s"],
            "exposed_comm_share": mean["exposed_comm_s"],
            "eta_s": left / mean["samples"] if mean["samples"] and left is not None and status == RUNNING else None,
            "accuracy": evaluated.get("ema_accuracy", evaluated.get("accuracy")),
            "best_accuracy": self.best,
            "metrics": metrics_of(evaluated),
            "checkpoint_step": self.newest.get("checkpoint", {}).get("step"),
            "ranks": self.newest.get("start", {}).get("ranks"),
            "attempt": self.newest.get("start", {}).get("attempt"),
            "seconds_since_last_record": None if last is None else max(time.time() - last, 0.0),
            "job": self.job(),
            "events": [{k: v for k, v in e.items() if k != "kind"} for e in self.events],
        }

    def status(self) -> str:
        """As the run says; where it says nothing, its owner tells whether it is still there: a killed one says nothing.
        Asked for again after the owner, who writes it and then leaves."""

        def said() -> str | None:
            return (self.folder.status() or {}).get("status")

        if not said() and time.monotonic() - self._owner[0] >= OWNER_EVERY_S:
            self._owner = time.monotonic(), at_work(self.folder.path)
        return said() or (RUNNING if self._owner[1] else NO_END)

    def length(self) -> tuple[int | None, int | None, float | None]:
        """(steps of the run, its epochs, samples that are left), decisions and amendments included."""
        recipe = recipes.load_resolved(self.folder.recipe)
        amendments = amend.checked(self.folder.read_amendments(), str(self.folder.amendments))
        samples = recipe.data.samples
        if not samples or not isinstance(recipe.batch.workers, int):
            return None, recipe.train.epochs, None
        if ":" in recipe.schedule.kind:  # the code of whoever trains is not run by who looks on
            steps = self.newest.get("start", {}).get("steps")
            left = steps and samples * recipe.train.epochs * max(0.0, 1 - self.done / steps)
            return steps, recipe.train.epochs, left
        schedule = amend.schedule_of(recipe, samples, [Decision(*d) for d in self.decisions], amendments)
        return schedule.steps, schedule.epochs, schedule.samples_ahead(self.done)

    def job(self) -> str | None:
        """State and time left of the job that the last start was, where its batch system knows it."""
        starts = self.folder.starts()
        start = starts[-1] if starts else {}
        job, system = start.get("job_id"), known.SCHEDULERS.get(start.get("scheduler"))
        if not job or system is None or not shutil.which(system.looks):
            return None
        if time.monotonic() - self._job[0] >= JOB_EVERY_S:
            found = system.look(str(job), JOB_TIMEOUT_S)
            if found is None:
                said = f"{system.title} does not answer"
            else:
                said = "; ".join(", ".join([s.state, *([f"{s.left} left"] if s.left else [])]) for s in found
                                 if s.state != HIDDEN)  # fmt: skip
            self._job = time.monotonic(), f"job {job}: {said or 'not in the queue'}"
        return self._job[1]


# ---------------------------------------------------------------- for people


def sparkline(values: list[float], width: int) -> str:
    """Means of equal runs of neighbours, as bars between the lowest and the highest."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((m - low) * scale)] for m in means)


def shortened(name: str, columns: int) -> str:
    """The end of a path, which tells runs apart, where the whole has no room."""
    return name if len(name) <= columns else f"…{name[-max(columns - 1, 1) :]}"


def lines(f: dict, losses: list[float], width: int) -> list[str]:
    """A view of `width` columns."""

    def some(pattern: str, *keys: str) -> str:
        return pattern.format(*(f[k] for k in keys)) if all(f[k] is not None for k in keys) else ""

    def row(*parts: str) -> str:
        return "  ".join(p for p in parts if p)

    share = f["step"] / f["steps"] if f["steps"] else 0.0
    silent = f["seconds_since_last_record"] or 0.0
    state = row(f["status"], f"start {f['attempt'] + 1}" if f["attempt"] else "", some("{} ranks", "ranks"))
    place = row(
        f"{share:.0%}",
        f"step {f['step']}" + (f"/{f['steps']}" if f["steps"] else ""),
        f"ETA {duration(f['eta_s'])}" if f["eta_s"] is not None else "",
    )
    bar = min(40, width - len(place) - len("[] "))  # a narrow terminal has no room for one
    found = [
        row(shortened(f["run"], width - len(state) - 2), state),
        (f"[{'█' * round(bar * share):░<{bar}}] " if bar >= SHORTEST else "") + place,
        row(
            f"epoch {f['epoch'] + 1}/{f['epochs']}" if f["epoch"] is not None else "",
            some("lr {:.4g}", "lr"),
            some("kn {:,}", "global_batch"),
            some("noise scale {:,.0f}", "noise_scale"),
        ),
        row(some("loss {:.4f}", "loss"), sparkline(losses, max(10, min(60, width - 20)))),
        row(
            some("{:,.0f} images/s", "images_per_s"),
            some("data wait {:.1%}", "data_wait_share"),
            some("sums {:.1%}", "exposed_comm_share"),
        ),
        row(some("test accuracy {:.2%}", "accuracy"), some("best {:.2%}", "best_accuracy")),
        row(*(f"{name} {value:.4g}" for name, value in f["metrics"].items())),
        some("last checkpoint: step {}", "checkpoint_step"),
        f["job"] or "",
        f"no record for {duration(silent)}" if f["status"] == RUNNING and silent > SILENT_S else "",
        "nobody is at work in it any more: it was killed; go on with hpc-lbsgd resume" if f["status"] == NO_END else "",
    ]
    for e in f["events"]:
        rest = ", ".join(f"{k} {v}" for k, v in e.items() if k not in ("time", "event", "step"))
        found.append(f"step {e.get('step')}: {e['event']} {rest}")
    return [line if len(line) <= width else line[: width - 1] + "…" for line in found if line]


def watch(run: str, once: bool, every_s: float, as_json: bool) -> None:
    """Show a run until it ends, or Ctrl-C; or once. as_json: one object, once."""
    live = Live(RunFolder(run))
    live.look()
    if as_json:
        print(json.dumps(live.facts()))
    elif once:
        print("\n".join(lines(live.facts(), list(live.losses), shutil.get_terminal_size().columns)))
    elif sys.stdout.isatty():
        on_terminal(live, every_s)
    else:
        in_lines(live)


def ended(f: dict) -> bool:
    return f["status"] != RUNNING


def on_terminal(live: Live, every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live as Screen
    from rich.text import Text

    console = Console()

    def view(f: dict) -> Text:
        return Text("\n".join(lines(f, list(live.losses), console.width)))

    f = live.facts()
    with Screen(view(f), console=console, auto_refresh=False) as screen:
        while not ended(f):
            time.sleep(every_s)
            live.look()
            f = live.facts()
            screen.update(view(f), refresh=True)


def in_lines(live: Live) -> None:
    while True:
        f = live.facts()
        eta = f"  ETA {duration(f['eta_s'])}" if f["eta_s"] is not None else ""
        loss = "" if f["loss"] is None else f"  loss {f['loss']:.4f}"
        rate = "" if f["images_per_s"] is None else f"  {f['images_per_s']:,.0f} images/s"
        print(f"{f['status']}  step {f['step']}/{f['steps'] or '?'}{loss}{rate}{eta}", flush=True)
        if ended(f):
            return
        time.sleep(PLAIN_EVERY_S)
        live.look()
