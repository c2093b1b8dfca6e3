"""A run's state in one file: weights, statistics and optimizer, by parameter name."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from hpc_lbsgd.api.run import Run
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel.agree import agree, together
from hpc_lbsgd.records import write_atomically
from hpc_lbsgd.train.own_optim import by_name, load_by_name

FORMAT = "hpc_lbsgd.api 1"
ALONE_S = 30.0


def save(path: str | os.PathLike[str], run: Run) -> None:
    """Write `run` to `path`, whole or not at all; rank 0 writes. Collective, between steps: after optimizer.step().

    Raises RunError inside a step, where ranks hold different weights or buffers, and where the model is not the one
    that was distributed; RequestError where `path` cannot be written, or not read again.
    """
    refuse_turned(path, run, "lb.save(path, run)")
    if not run.between_steps:
        raise RunError("lb.save: inside a step; save after optimizer.step()")
    run.check_model()
    with said_when_alone(run, "lb.save"):
        run.replica.check_equal("save")

    def write() -> None:
        state, groups = _by_name(run)
        content = {
            "format": FORMAT,
            "step": run.step,
            "result_part": plain(run.past.result_part()),
            "model": run.model.state_dict(),
            "optimizer_class": type(run.optimizer).__name__,
            "groups": plain(groups),
            "optimizer": plain(state),
        }
        refuse_unreadable(content, f"lb.save({os.fspath(path)})")
        whole = io.BytesIO()
        torch.save(content, whole)
        try:
            write_atomically(Path(path), whole.getvalue())
        except OSError as problem:
            raise RequestError(
                f"lb.save({os.fspath(path)}): cannot be written: {problem.strerror or problem}"
            ) from None

    agree(run.world.engine, write)


def load(path: str | os.PathLike[str], run: Run, *, amend: bool = False) -> int:
    """Put what `save` wrote back into `run`; returns the step to go on from, for `GlobalShuffle(start=...)`.

    Collective; any number of ranks, each of which reads the file. The first step that follows is refused under another
    seed or schedule than those of the file's steps.

    amend    go on with another seed or schedule from here on; the next file is of those

    Raises RequestError, with the name, where file and model do not fit. Nothing but tensors and numbers is unpickled.
    """
    refuse_turned(path, run, "lb.load(path, run)")
    if not run.between_steps:
        raise RunError("lb.load: inside a step; load before the loop, or after optimizer.step()")
    run.check_model()
    with said_when_alone(run, "lb.load"):
        content = together(run.world.engine, lambda: _read(Path(path), run))
    run.model.load_state_dict(content["model"])
    load_by_name(run.optimizer, list(run.model.named_parameters()), content["optimizer"], content["groups"])
    run.replica.check_equal("load")
    run.resume_at(int(content["step"]), content.get("result_part"), "" if amend else f"lb.load({path})")
    return run.step


def refuse_turned(path: object, run: object, call: str) -> None:
    """Raise RequestError for arguments in torch.save's order, or a model in the run's place."""
    if not isinstance(run, Run) or not isinstance(path, (str, os.PathLike)):
        raise RequestError(
            f"{call}: got {type(path).__name__}, {type(run).__name__}; a path, then what lb.distribute gave"
        )


def _read(path: Path, run: Run) -> dict[str, Any]:
    where = f"lb.load({path})"
    try:
        with zipfile.ZipFile(path) as whole:  # torch does not look at checksums
            if damaged := whole.testzip():
                raise RequestError(f"{where}: damaged: {damaged} in it is not what was written")
        content = torch.load(path, map_location=run.world.device, weights_only=True)
    except OSError as problem:
        raise RequestError(f"{where}: {problem.strerror or problem}") from None
    except RequestError:
        raise
    except Exception as problem:  # zipfile and torch raise many kinds for bytes that are none of theirs
        said = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise RequestError(f"{where}: is not a whole file of lb.save ({said})") from None
    part = content.get("result_part") if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(part, (dict, type(None))):
        raise RequestError(f"{where}: was not written by lb.save")
    made_by, stepper = content.get("optimizer_class"), type(run.optimizer).__name__
    if made_by not in (None, stepper):
        raise RequestError(f"{where}: was written with {made_by}, whose state {stepper} cannot go on from")
    found, own = content["model"], run.model.state_dict()
    if odd := sorted(found.keys() ^ own.keys()):
        raise RequestError(f"{where}: {odd[0]} is {'not in the model' if odd[0] in found else 'not in the file'}")
    for name, tensor in own.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise RequestError(
                f"{where}: {name} is {tuple(found[name].shape)} of {found[name].dtype}, in the model "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
    _, groups = _by_name(run)
    if [group["params"] for group in content["groups"]] != [group["params"] for group in groups]:
        raise RequestError(f"{where}: the optimizer's groups hold other parameters than the file's")
    return content


def plain(value: Any) -> Any:
    """numpy's numbers, as schedules make them, as Python's: others are not read without running code."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def refuse_unreadable(content: dict[str, Any], where: str) -> None:
    """Raise RequestError for what `load` would not read, before a file is written in place of a good one."""
    trial = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, lambda tensor: None, content), trial)
    trial.seek(0)
    try:
        torch.load(trial, weights_only=True)
    except pickle.UnpicklingError as problem:
        found = re.search(r"GLOBAL (\S+)", str(problem))
        raise RequestError(
            f"{where}: the optimizer or the model keeps {found[1] if found else 'something'}, which lb.load could not "
            "read without running code; keep tensors, numbers and texts"
        ) from None


@contextmanager
def said_when_alone(run: Run, asker: str) -> Iterator[None]:
    """Where other ranks do not come, a word on the screen: it would look like a hang."""

    def say() -> None:
        print(
            f"hpc-lbsgd: {asker} on rank {run.world.rank}: waiting for other ranks since {ALONE_S:.0f} s; all ranks "
            "call it, not `if rank == 0`",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(ALONE_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _by_name(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The optimizer's state and groups."""
    own = {id(p) for p in run.model.parameters()}
    for number, group in enumerate(run.optimizer.param_groups):
        if odd := [p for p in group["params"] if id(p) not in own]:
            raise RequestError(
                f"the optimizer's group {number} has a parameter of shape {tuple(odd[0].shape)} that is not the model's"
            )
    return by_name(run.optimizer, list(run.model.named_parameters()))
