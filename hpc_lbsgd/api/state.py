"""A run's state in one file: weights, statistics and optimizer, by parameter name."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from hpc_lbsgd.api.run import Run
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.parallel.agree import agree, together
from hpc_lbsgd.records import write_atomically
from hpc_lbsgd.train.own_optim import by_name, load_by_name

FORMAT = "hpc_lbsgd.api 1"


def save(path: str | os.PathLike[str], run: Run) -> None:
    """Write `run` to `path`, whole or not at all; rank 0 writes. Collective, between steps: after optimizer.step().

    Raises RunError inside a step, and where ranks hold different weights or something beside the parameters was
    changed; RequestError where `path` cannot be written.
    """
    if not run.between_steps:
        raise RunError("lb.save: inside a step; save after optimizer.step()")
    run.replica.check_others()
    run.replica.check_equal("save")

    def write() -> None:
        state, groups = by_name(run.optimizer, list(run.model.named_parameters()))
        content = {
            "format": FORMAT,
            "step": run.step,
            "model": run.model.state_dict(),
            "groups": groups,
            "optimizer": state,
        }
        whole = io.BytesIO()
        torch.save(content, whole)
        try:
            write_atomically(Path(path), whole.getvalue())
        except OSError as problem:
            raise RequestError(
                f"lb.save({os.fspath(path)}): cannot be written: {problem.strerror or problem}"
            ) from None

    agree(run.world.engine, write)


def load(path: str | os.PathLike[str], run: Run) -> int:
    """Put what `save` wrote back into `run`; returns the step to go on from, for `GlobalShuffle(start=...)`.

    Collective; any number of ranks, each of which reads the file.

    Raises RequestError, with the name, where file and model do not fit. Nothing but tensors and numbers is unpickled.
    """
    content = together(run.world.engine, lambda: _read(Path(path), run))
    run.model.load_state_dict(content["model"])
    load_by_name(run.optimizer, list(run.model.named_parameters()), content["optimizer"], content["groups"])
    run.replica.others = run.replica.digests_of_others()
    run.replica.check_equal("load")
    run.step = int(content["step"])
    return run.step


def _read(path: Path, run: Run) -> dict[str, Any]:
    where = f"lb.load({path})"
    try:
        content = torch.load(path, map_location=run.world.device, weights_only=True)
    except OSError as problem:
        raise RequestError(f"{where}: {problem.strerror or problem}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as problem:
        raise RequestError(f"{where}: is not a whole file of lb.save ({str(problem).splitlines()[0]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RequestError(f"{where}: was not written by lb.save")
    found, own = content["model"], run.model.state_dict()
    if odd := sorted(found.keys() ^ own.keys()):
        raise RequestError(f"{where}: {odd[0]} is {'not in the model' if odd[0] in found else 'not in the file'}")
    for name, tensor in own.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise RequestError(
                f"{where}: {name} is {tuple(found[name].shape)} of {found[name].dtype}, in the model "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
    _, groups = by_name(run.optimizer, list(run.model.named_parameters()))
    if [group["params"] for group in content["groups"]] != [group["params"] for group in groups]:
        raise RequestError(f"{where}: the optimizer's groups hold other parameters than the file's")
    return content
