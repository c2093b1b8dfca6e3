"""`evaluate`: a run's loss and accuracy on its own or other data. One process, or every rank of a launcher."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data.fields import CLASS
from hpc_lbsgd.data.find import find, is_plain_folder
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.who import set_of
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import together
from hpc_lbsgd.parallel.engine import Engine
from hpc_lbsgd.train import metrics, sets
from hpc_lbsgd.train.evaluate import evaluate as measure
from hpc_lbsgd.train.job import meet
from hpc_lbsgd.train.parts import make_loaders
from hpc_lbsgd.train.prepare import check_targets, open_user_data
from hpc_lbsgd.trained.opened import Trained, open_run
from hpc_lbsgd.urls import is_url


@dataclass
class OnRank(Trained):
    """With the engine over which an evaluation sums."""

    engine: Engine


def evaluate(run: str, data: str | None, at: str, plain: bool) -> dict | None:
    """{run, step, averaged, data, loss, accuracy, samples} with own metrics; None on ranks that have nothing to say.
    Collective.

    data: a folder or manifest with the run's classes (default: the recipe's data.eval).
    """
    found = open_run(run, at, plain)  # refuses on every rank alike, before ranks meet
    recipe = found.recipe
    if worlds.from_environment().size == 1:  # nothing to sum: neither Horovod nor MPI is needed
        recipe = recipe.model_copy(update={"machine": recipe.machine.model_copy(update={"engine": "torch"})})
    device, engine = meet(recipe)
    try:
        found = OnRank(**vars(found), engine=engine)
        found.device = device
        found.model.to(device)
        recipe, chosen = together(engine, lambda: open_set(found, data))
        sets.refuse_other(chosen.fingerprint, engine)  # each rank has looked for itself: it may be replaced meanwhile
        memory_format = torch.channels_last if found.channels_last else torch.contiguous_format
        _, loader = together(engine, lambda: make_loaders(recipe, chosen, chosen, memory_format, engine, device))
        result = measure(found, loader, len(chosen), recipe.machine.eval_batch, metrics.of_recipe(recipe.train))
        what = {
            "run": run,
            "step": found.step,
            "averaged": found.averaged,
            "data": str(data or recipe.data.eval or recipe.data.dataset),
        }
        return what | result if engine.rank == 0 else None
    finally:
        engine.close()


def open_set(found: Trained, data: str | None):
    """(the recipe for it, the set to evaluate on), checked against what the run was trained for."""
    recipe = found.recipe
    if recipe.data.dataset:
        if data:
            raise RequestError(f"{data}: this run's data is its own ({recipe.data.dataset}), which has one eval part")
        return recipe, open_user_data(recipe)[1]
    path = data or recipe.data.eval
    if path and not data and not is_url(path):
        path = os.path.join(found.folder.home() or "", path)
    if not path:
        raise RequestError(f"{found.folder.path}: its recipe has no data.eval; name the data to evaluate on")
    if is_plain_folder(path):
        raise RequestError(f"{path} is not indexed: hpc-lbsgd data index {path} --classes-of {recipe.data.train}")
    chosen = Manifest(find(path))
    chosen.check_files()
    before = set_of(recipe.data)
    if before is not None and before.own != chosen.own:
        raise RequestError(f"{path}: its samples are made otherwise than those that the run was trained on")
    check_targets(recipe, chosen)
    known = found.classes()
    if CLASS in recipe.data.targets and chosen.classes != known:
        odd = next((c for c in chosen.classes if c not in known), None)
        raise RequestError(
            f"{path}: its classes are not the run's "
            + (f"({odd!r} is not one of {len(known)})" if odd else f"({len(chosen.classes)}, the run has {len(known)})")
            + f"; index it with --classes-of {recipe.data.train}"
        )
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": str(path)})})
    loaders.check_sizes(recipe.data, chosen, False)
    return recipe, chosen
