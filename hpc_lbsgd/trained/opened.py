"""A run's model with the weights of one of its checkpoints, without the machinery of training."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.amend import checked, recipe_now
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.targets import Inputs
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import checkpoint, models
from hpc_lbsgd.train.replica import DTYPES, memory_format_of, outputs, unfold_expanded

NEWEST, BEST = "newest", "best"


@dataclass
class Trained:
    """A model ready to be asked. `outputs` computes as an evaluation in the run does."""

    folder: RunFolder
    recipe: Recipe
    step: int  # steps that its weights have been trained for
    averaged: bool  # they are the moving average (train.ema_decay)
    model: nn.Module
    device: torch.device

    @property
    def channels_last(self) -> bool:
        return memory_format_of(self.recipe, self.model, self.device) == torch.channels_last

    def outputs(self, inputs: Inputs):
        """The model's outputs for a batch; images are (B, C, S, S), normalised as the recipe says."""
        precision = self.recipe.precision
        return outputs(self.model, inputs, DTYPES[precision], self.device, precision == "bf16")

    def classes(self) -> list[str]:
        """Names of the classes, by label: the run's; where it did not write them down, its data's; else numbers."""
        try:
            return json.loads(self.folder.classes.read_text())
        except (OSError, ValueError):
            pass
        try:
            return Manifest(find(self.recipe.data.train or "")).classes
        except RequestError:
            return [str(i) for i in range(self.recipe.data.classes or 0)]

    def said(self) -> str:
        """Whose weights these are, for people."""
        return f"{self.folder.path}, step {self.step}" + (", averaged weights" if self.averaged else "")


def open_run(run: str, at: str = NEWEST, plain: bool = False, device: torch.device | None = None) -> Trained:
    """The model of a run with the weights of a checkpoint: NEWEST, BEST, or a step's number.

    Averaged weights where the recipe keeps them (`best` is judged by them), unless `plain`. Raises RequestError for
    what is no run, has no such checkpoint, or one that is not whole.
    """
    device = device or torch.device("cpu")
    folder = RunFolder(run)
    if not folder.exists():
        raise RequestError(f"{run}: no run (no recipe.yaml in it)")
    path, state = find_checkpoint(folder, at)
    recipe = recipe_now(
        recipes.load_resolved(folder.recipe), checked(folder.read_amendments(), str(folder.amendments)), state.step
    )
    averaged = recipe.train.ema_decay is not None and not plain
    weights = checkpoint.read(path / (checkpoint.AVERAGE if averaged else checkpoint.WEIGHTS))
    dtype = DTYPES[recipe.precision]
    model = models.build(recipe.model, recipe.data.channels, recipe.data.classes, recipe.seed, dtype, fresh=True)
    unfold_expanded(model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as problem:
        raise RequestError(f"{path}: not the weights of model.name = {recipe.model.name}: {problem}") from None
    model.to(device, memory_format=memory_format_of(recipe, model, device)).eval()
    return Trained(folder, recipe, state.step, averaged, model, device)


def find_checkpoint(folder: RunFolder, at: str) -> tuple[Path, checkpoint.State]:
    """A run's checkpoint and its state, its files verified."""
    if at in (NEWEST, BEST):
        found = checkpoint.find_newest(folder)
        if found is None:
            raise RequestError(f"{folder.path}: no checkpoint was written yet")
        path, state, damaged = found
        if damaged and worlds.from_environment().rank == 0:  # people asked for the newest, and get an older one
            print(*(f"left out: {problem}" for problem in damaged), f"taken: {path}", sep="\n", file=sys.stderr)
        if at == NEWEST or state.best_step in (None, state.step):
            return path, state
        at = str(state.best_step)
    there = checkpoint.steps_there(folder.checkpoints)
    if not at.isdigit() or int(at) not in there:
        raise RequestError(f"--at {at}: expected {NEWEST}, {BEST} or a step of {', '.join(map(str, there)) or 'none'}")
    path = folder.checkpoints / checkpoint.name_of(int(at))
    try:
        return path, checkpoint.read_whole(path)
    except (OSError, ValueError) as problem:
        raise RequestError(f"{path}: {problem}") from None
