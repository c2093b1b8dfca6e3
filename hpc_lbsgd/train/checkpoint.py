"""Checkpoints: written whole or not at all, loaded without running code.

    checkpoints/step-00012345/weights.pt      a plain state dict, BatchNorm statistics in it
                              weights_ema.pt  the same with averaged weights, if the recipe has train.ema_decay
                              optimizer.pt    {"momentum": {parameter name: tensor}, ...}; of optimizers that are not
                                              ours {"state": {parameter name: ...}, "groups": [...]}
                              state.json      step, fingerprints, decisions, noise, SHA-256 of the files and of this one
    checkpoints/LATEST                      the name of the newest
No data state: the order of samples is a function of the step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Decision
from hpc_lbsgd.records import RunFolder, sync_folder, what_to_do, write_atomically
from hpc_lbsgd.theory.noise import Measurement
from hpc_lbsgd.train.replica import Replica, state_sha256
from hpc_lbsgd.train.snapshot import HostCopy, Snapshot

WEIGHTS, AVERAGE, OPTIMIZER = "weights.pt", "weights_ema.pt", "optimizer.pt"
FILES = {"weights": WEIGHTS, "optimizer": OPTIMIZER, "average": AVERAGE}  # by part of a snapshot
LATEST = "LATEST"
SELF = "sha256"  # in state.json: of what else is in it
# What a step does with the same recipe. 2: a tail's absent samples count as zeros; averages have statistics. 3: int32's
# units after tails and after steps without a gradient.
RULES = 3


def other_rules(recipe, rules: int) -> str | None:
    """What in a recipe followed other rules when a checkpoint was written by `rules`."""
    if rules > RULES:
        return "steps"
    if rules < 2 and (recipe.batch.last_batch == "partial" or recipe.train.ema_decay):
        return "partial tails and averaged weights"
    return "units of int32" if rules < 3 and recipe.fixed_point == "int32" else None


@with_config(ConfigDict(extra="forbid"))
@dataclass
class State:
    """What a checkpoint holds beside tensors. `step` steps are done."""

    step: Annotated[int, Field(ge=0)]
    recipe_fingerprint: str
    data_fingerprint: str
    weights_sha256: str = ""
    best_score: float | None = None  # accuracy, of the averaged weights where there are any; else minus the loss
    best_step: int | None = None
    decisions: list[Decision] = field(default_factory=list)  # adaptive batch
    skipped: list[int] = field(default_factory=list)  # steps that changed nothing (train.on_bad_step = skip)
    exponents: dict[str, int] = field(default_factory=dict)  # fixed_point int32: of each parameter's unit
    noise: list[Measurement] = field(default_factory=list)  # the last ones
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 by file name
    rules: int = 1  # those it was trained by (RULES); the first ones were not written down
    finished: bool = False  # a callback has ended the run early


STATE = TypeAdapter(State)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: RunFolder, replica: Replica, state: State, keep: int) -> Path:
    """Write a checkpoint of this rank's replica at once (see writer.py for one beside the steps)."""
    return write(folder, HostCopy().take(replica, state), keep)


def write(folder: RunFolder, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint; afterwards only the last `keep` and the best one are left.

    LATEST moves when files and folders are durable. Raises RunError where the disk does not take it.
    """
    state, root = snapshot.state, folder.checkpoints
    target, building = root / name_of(state.step), root / f".{name_of(state.step)}.{os.getpid()}"
    try:
        snapshot.wait()
        if not root.exists():
            root.mkdir(parents=True, exist_ok=True)
            sync_folder(root.parent)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        state.files = {}
        for part, content in snapshot.tensors.items():
            name = FILES[part]
            with open(building / name, "wb") as f:
                write_tensors(content, f)
                f.flush()
                os.fsync(f.fileno())
            state.files[name] = file_sha256(building / name)
        state.weights_sha256 = state_sha256(snapshot.tensors["weights"])
        write_atomically(building / "state.json", json.dumps(signed(vars(state)), indent=1) + "\n")
        if target.exists():  # the same step, saved by an earlier start, and torn: a resume took an older one
            discard(target)
        os.replace(building, target)
        sync_folder(root)
        write_atomically(root / LATEST, target.name + "\n")
    except (OSError, RuntimeError) as problem:
        shutil.rmtree(building, ignore_errors=True)
        raise RunError(
            f"checkpoint at step {state.step} not written: {problem}. The older ones are untouched in {root}; "
            f"{what_to_do(problem)} and start again with --resume"
        ) from None
    try:
        prune(root, keep, state.best_step)
    except OSError as problem:
        raise RunError(
            f"checkpoint at step {state.step} is written, but an older one cannot be removed: {problem}; "
            f"{what_to_do(problem)} and start again with --resume"
        ) from None
    return target


def write_tensors(content: dict, file) -> None:
    """torch.save, whose own message of a disk that fails does not say how: raises the OSError."""
    met = []

    class Watched:
        flush = file.flush

        def write(self, data):
            try:
                return file.write(data)
            except OSError as problem:
                met.append(problem)
                raise

    try:
        torch.save(content, Watched())
    except RuntimeError:
        if met:
            raise met[0] from None
        raise


def signed(content: dict) -> dict:
    """The content of state.json, with the SHA-256 of all that is in it."""
    return {**content, SELF: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def steps_there(root: Path) -> list[int]:
    """Steps of the finished checkpoints, oldest first. Folders with other names are a person's."""
    names = (re.fullmatch(r"step-(\d{8,})", p.name) for p in root.glob("step-*") if p.is_dir())
    return sorted(int(name[1]) for name in names if name)


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Delete what is older than the newest `keep` that are whole, but not the best. A torn one counts for nothing."""
    whole = 0
    for step in reversed(steps_there(root)):
        path = root / name_of(step)
        if whole < keep:
            whole += is_whole(path)
        elif step != best_step:
            discard(path)


def read_whole(path: Path) -> State:
    """The state of a checkpoint whose files are what was written; else raises ValueError or OSError that says what
    is not."""
    try:
        content = json.loads((path / "state.json").read_text())
        digest = content.pop(SELF, None)
        state = STATE.validate_json(json.dumps(content), strict=True)  # from JSON, where tuples are lists
        if digest not in (None, signed(content)[SELF]):  # None: of a version that wrote none
            raise ValueError("state.json is not what was written")
        broken = [n for n, digest in state.files.items() if file_sha256(path / n) != digest]
    except ValidationError as problem:
        first = problem.errors()[0]
        raise ValueError(f"state.json: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (TypeError, AttributeError, RecursionError) as problem:
        raise ValueError(problem) from None
    if broken or not state.files:
        raise ValueError(f"{', '.join(broken) or 'state.json'} is not what was written")
    return state


def read_named(path: Path) -> State:
    """As `read_whole`, of a checkpoint that is of the step it is named after: another is a person's copy."""
    state = read_whole(path)
    if path.name != name_of(state.step):
        raise ValueError(f"it is of step {state.step}, by another name")
    return state


def is_whole(path: Path) -> bool:
    """Whether a resume would take it; read once for a process where nobody touched the files meanwhile."""
    try:
        stats = (f.stat() for f in sorted(path.iterdir()))
        return _is_whole(path, tuple((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))
    except OSError:
        return False


@functools.lru_cache(maxsize=1024)
def _is_whole(path: Path, files: tuple) -> bool:
    try:
        read_named(path)
    except (OSError, ValueError):
        return False
    return True


def discard(path: Path) -> None:
    """Delete a checkpoint; out of sight first, so that a deletion cut short leaves no half of one behind."""
    doomed = path.with_name(f".old.{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: RunFolder) -> None:
    """Remove what killed writers left."""
    for path in folder.checkpoints.glob(".*step-*"):
        shutil.rmtree(path, ignore_errors=True)


def find_newest(folder: RunFolder) -> tuple[Path, State, list[str]] | None:
    """The newest checkpoint whose files are whole, and a sentence for each newer one that is not."""
    problems, there = [], steps_there(folder.checkpoints)
    for step in reversed(there):
        path = folder.checkpoints / name_of(step)
        try:
            return path, read_named(path), problems
        except (OSError, ValueError) as problem:
            problems.append(f"{path}: {problem}")
    if there != steps_there(folder.checkpoints):  # of a run that goes on: those that were there are pruned by now
        return find_newest(folder)
    if problems:
        raise RequestError(
            f"no usable checkpoint in {folder.checkpoints}:\n  "
            + "\n  ".join(problems)
            + "\nstart again without --resume in another run folder"
        )
    return None


def load(path: Path, replica: Replica) -> None:
    """Fill this rank's replica from a checkpoint's files."""
    weights, moments = read(path / WEIGHTS), read(path / OPTIMIZER)
    own = replica.model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or extra or shapes:
        raise RequestError(
            f"{path}: the checkpoint is of another model (missing {missing[:5]}, unknown {extra[:5]}, "
            f"other shape {shapes[:5]})"
        )
    with torch.no_grad():
        for name, value in own.items():  # in place: parameters are views into the buckets
            value.copy_(weights[name])
        replica.optimizer.load(moments, str(path))
        if replica.average:
            averaged = read(path / AVERAGE)
            for name, value in replica.averaged().items():
                value.copy_(averaged[name])


def read(path: Path) -> dict:
    """A file of tensors; refuses anything that would run code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises many kinds for bytes that are none of its own
        raise RequestError(f"{path}: not a file of tensors ({next(iter(str(problem).splitlines()), '')})") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: not names and tensors")
    return content
