"""`audit`: steps that a run has taken are taken again here, and must come out as they are on record. One process, or
every rank of a launcher.

It is a resume in a copy of the run folder, up to a cap, by a trainer that neither evaluates nor saves. The run's own
folder is read, and nothing else: whoever has it goes on with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpc_lbsgd import amend
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import EXIT_DONE, EXIT_FAILED, RequestError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import agree
from hpc_lbsgd.records import RunFolder, read_metrics, whole
from hpc_lbsgd.report.compare import different, facts_of, first_difference
from hpc_lbsgd.train import checkpoint, job
from hpc_lbsgd.train.prepare import Prepared, prepare
from hpc_lbsgd.train.replica import state_sha256
from hpc_lbsgd.train.stops import Stops
from hpc_lbsgd.train.trainer import Trainer

# nobody is told, and what is saved is nobody's
UNHEARD = ("train.callbacks=[]", "train.loggers=[]", "train.metrics=[]", "checkpoint.steps=null",
           "checkpoint.minutes=null")  # fmt: skip


def audit(run: str, start: int | None, count: int, settings: list[str], as_json: bool) -> int:
    """Take up to `count` steps of a run again, from its checkpoint of step `start` (0: from its start; default: the
    newest that steps on record follow); returns the process's exit code: 1 where bits are promised and differ.

    settings: keys that a resume may change. Collective.
    """
    folder = RunFolder(Path(run).absolute())
    if not folder.exists():
        raise RequestError(f"{run}: no run (no recipe.yaml in it)")
    recipe = recipes.read(str(folder.recipe), [*settings, *UNHEARD])
    with contextlib.suppress(OSError):  # another person's, perhaps; the recipe's relative paths alone are from there
        os.chdir(folder.home() or ".")
    found, stops = Audit(run, folder, start, count, as_json), AtOnce(False)
    stops.listen()
    with temporary_folder() if worlds.from_environment().rank == 0 else contextlib.nullcontext() as copy:
        trainer = functools.partial(Auditor, found)
        return job.train(f"audit of {run}", recipe, copy, stops=stops, settle=found.settle, trainer=trainer)


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """Removed by a process beside this one as soon as this one is through, or is no more: where MPI ends all ranks,
    none of them can."""
    path = tempfile.mkdtemp(prefix="hpc-lbsgd-audit-")
    remove = ["/bin/sh", "-c", 'cat > /dev/null; rm -rf -- "$0"', path]
    with subprocess.Popen(remove, stdin=subprocess.PIPE, start_new_session=True):  # its end closes that, and waits
        yield path


class AtOnce(Stops):
    """Nothing has to be saved: what asks for the end ends it, as Ctrl-C does."""

    def _on_signal(self, number: int, frame) -> None:
        raise KeyboardInterrupt

    def asked(self) -> bool:
        return False


class Auditor(Trainer):
    def __init__(self, found: Audit, *what):
        super().__init__(*what)
        self.audit = found
        self.state.finished = False  # by a callback; the run went on, for steps follow

    def _evaluate(self, epochs: int) -> bool:
        return False

    def _save(self) -> None:
        pass

    def _say_end(self, stopped: bool, seconds: float) -> None:
        pass

    def _end(self, stopped: bool, seconds: float) -> int:
        super()._end(stopped, seconds)
        self.engine.barrier()  # no heartbeat is written any more
        return agree(self.engine, lambda: self.audit.judge(self.folder, self.recipe.determinism))


class Audit:
    """Which steps, what is on record of them, and what comes of it. Rank 0 alone knows."""

    def __init__(self, run: str, folder: RunFolder, start: int | None, count: int, as_json: bool):
        self.run, self.folder, self.start, self.count, self.as_json = run, folder, start, count, as_json

    def settle(self, copy: RunFolder, recipe: recipes.Recipe, *how) -> Prepared:
        """`prepare`, of a resume in `copy` that ends with the last of the steps. Raises RequestError for what cannot be
        audited."""
        try:
            self.copy_to(copy)
            train = recipe.train.model_copy(update={"max_steps": self.end})
            return prepare(copy, recipe.model_copy(update={"train": train}), *how)
        except OSError as problem:  # a run that goes on prunes
            raise RequestError(f"{self.run}: cannot be read or copied as it is now: {problem}") from None
        except RequestError as problem:
            raise RequestError(str(problem).replace(str(copy.path), self.run)) from None

    def copy_to(self, copy: RunFolder) -> None:
        """What the steps follow from. Contents alone: who may not write the run's files is to remove these."""
        self._choose()
        files = [self.folder.recipe, self.folder.metrics, self.folder.preflight]
        files += self._path(self.first).iterdir() if self.first else []
        for path in filter(Path.is_file, files):
            target = copy.path / path.relative_to(self.folder.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        copy.write_amendments(self.amendments)

    def _choose(self) -> None:
        # amendments first: a resume that brings one takes the steps after it back before it writes it down
        amendments = amend.checked(self.folder.read_amendments(), str(self.folder.amendments))
        records = list(filter(whole, read_metrics(self.folder.metrics)))
        steps = {r["step"]: r for r in records if r["kind"] == "step"}
        there = checkpoint.steps_there(self.folder.checkpoints)
        self.first = last = self._first(there, steps)
        late = [at for at, changes in amendments if at > self.first and set(changes) & set(amend.AT_START)]
        while last in steps and last - self.first < self.count and last not in late:
            last += 1
        ends = {r["step"]: r.get("weights_sha256") for r in records if r["kind"] == "end"}
        saved = [s for s in there if self.first < s <= last and checkpoint.is_whole(self._path(s))]
        self.end = max([*saved, *(s for s in ends if self.first < s <= last)], default=last)
        self.weights = {"end": ends[self.end]} if ends.get(self.end) else {}
        if self.end in saved:
            self.weights["checkpoint"] = state_sha256(checkpoint.read(self._path(self.end) / checkpoint.WEIGHTS))
        self.steps = {step: steps[step] for step in range(self.first, self.end)}
        self.amendments = [[at, changes] for at, changes in amendments if at < self.end]
        starts = [r for r in records if r["kind"] == "start"]
        until = [*(r["step"] for r in starts[1:]), math.inf]
        self.starts = [r for r, to in zip(starts, until, strict=False) if r["step"] < self.end and to > self.first]

    def _path(self, step: int) -> Path:
        return self.folder.checkpoints / checkpoint.name_of(step)

    def _first(self, there: list[int], steps: dict[int, dict]) -> int:
        if self.start == 0 and 0 in steps:
            return 0  # nothing is needed but the recipe
        for step in reversed(there):
            if step in steps and self.start in (None, step) and checkpoint.is_whole(self._path(step)):
                return step
        which = self.run if self.start is None else f"--from {self.start}: {self.run}"
        raise RequestError(
            f"{which} has no {'' if self.start is None else 'such '}whole checkpoint that steps on record follow "
            f"(checkpoints: {', '.join(map(str, there)) or 'none'}; last step: {max(steps, default='none')}); --from 0 "
            "begins where the run did"
        )

    def judge(self, copy: RunFolder, determinism: str) -> int:
        """Print what came of it; returns the exit code."""
        records = list(filter(whole, read_metrics(copy.metrics)))
        taken = {r["step"]: r for r in records if r["kind"] == "step"}
        here = [r for r in records if r["kind"] == "start"][-1]
        first = first_difference(self.steps, {step: taken.get(step, {}) for step in self.steps})
        weights = {who: digest == records[-1]["weights_sha256"] for who, digest in self.weights.items()}
        found = {
            "run": self.run,
            "from": self.first,
            "to": self.end,
            "ranks": here["ranks"],
            "determinism": determinism,
            "promised": promised(determinism, self.starts, here),
            "equal": first is None and all(weights.values()),
            "first_difference": first,
            "largest_relative_difference": max(apart(r, taken.get(step, {})) for step, r in self.steps.items()),
            "weights": weights,
            "start": different(facts_of(self.folder, self.starts), facts_of(copy, records)),
        }
        print(json.dumps(found) if self.as_json else show(found), flush=True)
        return EXIT_DONE if found["equal"] or not found["promised"] else EXIT_FAILED


def promised(determinism: str, starts: list[dict], here: dict) -> bool:
    """Whether the same bits are to come out as of those starts: never on a device of another kind."""
    kinds = {re.sub(r":\d+", "", str(r.get("device"))) for r in (*starts, here)}  # without the number of a rank's GPU
    same_ranks = {r["ranks"] for r in starts} == {here["ranks"]}
    return len(kinds) == 1 and (determinism == "any-ranks" or (determinism == "same-ranks" and same_ranks))


def apart(a: dict, b: dict) -> float:
    """How far two losses are from one another, as a share of the larger."""
    x, y = a.get("loss"), b.get("loss")
    return abs(x - y) / max(abs(x), abs(y)) if type(x) is type(y) is float and x != y else 0.0


def show(found: dict) -> str:
    """For people."""
    end, first, ranks = found["to"], found["first_difference"], found["ranks"]
    what = f"{found['run']}: steps {found['from']} to {end - 1}, taken again on {ranks} rank{'s' * (ranks > 1)}"
    if found["equal"]:
        more = f", and so are the weights after {end} steps" if found["weights"] else ""
        return f"{what}: the same as on record to the last digit{more}"
    if not found["promised"]:
        what += (
            f": losses differ by at most {found['largest_relative_difference']:.2g} of the larger. Shown, not judged: "
            f"with determinism: {found['determinism']} the same bits are not promised here"
        )
    lines = [what if first else f"{what}: the same as on record"]
    if first:
        lines.append(f"  step {first['step']} is the first that is not as on record (on record  |  here)")
        lines += [f"    {key:30s} {json.dumps(a)}  |  {json.dumps(b)}" for key, (a, b) in first["what"].items()]
    lines += [
        f"  weights after {end} steps: {'' if equal else 'not '}those of the run's {who}"
        for who, equal in found["weights"].items()
    ]
    if found["start"]:
        lines.append("  what ran otherwise (on record  |  here)")
        lines += [f"    {key:30s} {json.dumps(a)}  |  {json.dumps(b)}" for key, (a, b) in found["start"].items()]
    return "\n".join(lines)
