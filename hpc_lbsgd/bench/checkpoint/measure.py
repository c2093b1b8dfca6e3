"""Checkpoints of a recipe's model as the trainer takes them, at once and behind the steps."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from hpc_lbsgd.errors import RunError
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train.checkpoint import State
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.writer import Writer

WAYS = ("at once", "behind the steps")
LIMIT_S = 600.0


class Cost(NamedTuple):
    stall_s: float  # what the steps wait: checksums over the weights, the copy, and, at once, the write
    write_s: float
    bytes: int


class Bench:
    """A replica of the recipe's model on this process's device, and a folder under `folder` for its checkpoints."""

    def __init__(self, recipe: Recipe, folder: Path):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        recipe = recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"engine": "torch"})})
        self.engine = engines.create(recipe.machine, recipe.determinism, device)
        self.replica = Replica(recipe, recipe.data.classes, self.engine, device)
        self.replica.synchronise()
        self.place = tempfile.TemporaryDirectory(dir=folder, prefix=".bench-checkpoint-")
        self.writer = Writer(RunFolder(self.place.name), 1, LIMIT_S, self._stuck)
        self.step = 0

    def _stuck(self, message: str) -> None:
        self.engine.abort(1)

    def cost(self, way: str) -> Cost:
        self.step += 1
        before = time.perf_counter()
        self.replica.check_others()
        self.replica.check_equal("benchmark")
        self.writer.save(self.replica, State(self.step, "", ""))
        if way == WAYS[0]:
            self.writer.join()
        stall_s = time.perf_counter() - before
        saved = self.writer.wait()
        if saved is None:
            raise RunError("no checkpoint was written")
        return Cost(stall_s, saved.seconds, saved.bytes)

    def close(self) -> None:
        self.place.cleanup()
        self.engine.close()
