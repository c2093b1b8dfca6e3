"""Callbacks of the user's own (`train.callbacks`): they are told what the records say, and may ask the run to end.

Rank 0 alone has them, so that nothing they do meets other ranks, and they are given no handle on model, optimizer or
data: what they see are records and copies. One that fails is named, and ends the run at its next safe point; one that
changes the model by other ways, or torch's settings, ends it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hpc_lbsgd.errors import RequestError, RunError, did_you_mean
from hpc_lbsgd.imports import load, place_of

HOOKS = {  # by kind of record
    "start": "on_start",
    "step": "on_step",
    "epoch": "on_epoch",
    "eval": "on_evaluation",
    "checkpoint": "on_checkpoint",
    "event": "on_event",
    "end": "on_end",
}


class View:
    """What a callback is handed beside the record.

    folder   the run's folder
    recipe   as it is settled, plain values
    """

    def __init__(self, folder: Path, recipe: dict, replica, ask: Callable[[], None]):
        self.folder, self.recipe, self._replica, self._ask = folder, recipe, replica, ask
        self._finished = False

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the model's state dict, in host memory."""
        return {name: t.detach().to("cpu", copy=True) for name, t in self._replica.model.state_dict().items()}

    def stop(self) -> None:
        """End after the next step, with a checkpoint, as stopped: a resume goes on."""
        self._ask()

    def finish(self) -> None:
        """End after the next step, with a checkpoint, as done: early stopping."""
        self._finished = True
        self._ask()


class Callbacks:
    """Listens to metrics records and hands each to those who want it.

    fault: what went wrong in one, once it has; nobody is called after that. finished: one has asked for the end.
    """

    def __init__(self, names: Sequence[str], view: View):
        self.view, self.fault, self.hooks = view, None, [(name, hook_of(name)) for name in names]

    @property
    def finished(self) -> bool:
        return self.view._finished

    def __call__(self, record: dict) -> None:
        for name, hook in self.hooks if self.fault is None else ():
            # a digest of the weights takes a pass over them: not at each step
            digest = None if record["kind"] == "step" else int(self.view._replica.digest())
            before = settings()
            try:
                hook(dict(record), self.view)
            except (Exception, SystemExit) as problem:
                self._fail(f"{name}: {type(problem).__name__}: {problem}{place_of(problem)}")
            if (after := settings()) != before:  # at once: no later step, and no checkpoint of one
                what = next(key for key in before if before[key] != after[key])
                raise RunError(f"train.callbacks = {name}: changed torch's {what}, which decides bits of later steps")
            if digest is not None and int(self.view._replica.digest()) != digest:
                raise RunError(
                    f"train.callbacks = {name}: changed the model, whose weights are no longer the recipe's; take that "
                    "out, and start again with --resume"
                )

    def _fail(self, what: str) -> None:
        if self.fault is None:
            self.fault = f"train.callbacks = {what}"
            print(f"hpc-lbsgd: {self.fault}; the run ends after its next step", file=sys.stderr, flush=True)
            self.view._ask()

    def close(self) -> None:
        """Nothing is left to do: `on_end` was told."""


def hook_of(name: str) -> Callable[[dict, View], None]:
    """A function of (record, view), which hears all records; or of a class, made without arguments, its methods by
    HOOKS. Raises RequestError for what is neither."""
    found = load(name, "train.callbacks")
    if not isinstance(found, type):
        return found
    try:
        made = found()
    except Exception as problem:
        raise RequestError(
            f"train.callbacks = {name}: {type(problem).__name__}: {problem}{place_of(problem)}"
        ) from None
    own = [word for word in dir(made) if word.startswith("on_")]
    if odd := [word for word in own if word not in HOOKS.values()]:
        near = did_you_mean(odd[0], HOOKS.values())
        raise RequestError(
            f"train.callbacks = {name}: nothing calls {odd[0]}; called: {', '.join(HOOKS.values())}{near}"
        )
    if not own:
        raise RequestError(f"train.callbacks = {name}: has none of {', '.join(HOOKS.values())}")

    def hook(record: dict, view: View) -> None:
        method = getattr(made, HOOKS[record["kind"]], None)
        if method:
            method(record, view)

    return hook


def settings() -> dict[str, object]:
    """Of torch, for the whole process: those that decide bits."""
    return {
        "number of threads": torch.get_num_threads(),
        "default type": torch.get_default_dtype(),
        "deterministic mode": torch.get_deterministic_debug_mode(),
        "precision of products": torch.get_float32_matmul_precision(),
        "gradient mode": torch.is_grad_enabled(),
    }
