"""Who gets which sample, and how many there are: from a recipe, or from numbers alone."""

from __future__ import annotations

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import fields
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.order import Permutation, worker_samples
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.urls import is_url


def set_of(data) -> Manifest | None:
    """What a recipe's `data` section trains on; None where it is not there, or only the network has it."""
    try:
        return Manifest(find(data.train)) if data.train and not is_url(data.train) else None
    except RequestError:
        return None


def samples_and_classes(recipe: Recipe) -> tuple[int, int]:
    """N and the number of classes: from the data where it is there, else from the recipe."""
    data = recipe.data
    if data.dataset and not (data.samples and data.classes):
        from hpc_lbsgd.data.user import UserSet

        own = UserSet(data.dataset, "train")
        return len(own), data.classes or len(own.classes) or 1000
    found = set_of(data)
    samples, classes = data.samples or (found and len(found)), data.classes
    if found and not classes:
        if found.own:
            return len(found), len(found.classes) or 1000
        fields.refuse_unknown(data, found.fields, str(found.path))
        classes = fields.outputs(data.targets, found.fields, len(found.classes))
    if not samples:
        raise RequestError("data.samples is not set, and data.train has no manifest to count: set data.samples=N")
    if found and len(found) != samples:
        raise RequestError(f"data.samples = {samples}, but {data.train} has {len(found)}")
    return samples, classes or 1000


def order(
    name: str | None,
    settings: list[str],
    samples: int | None,
    workers: int | None,
    samples_per_worker: int | None,
    seed: int | None,
    last_batch: str | None,
    epoch: int,
    worker: int,
) -> dict:
    """Worker j's samples of an epoch: `samples` in order, `steps` the same a list a step.

    From a recipe, or from numbers alone; numbers beside a recipe change it.
    """
    overrides = {
        "batch.workers": workers,
        "batch.samples_per_worker": samples_per_worker,
        "seed": seed,
        "batch.last_batch": last_batch,
        "data.samples": samples,
    }
    changed = [*settings, *(f"{k}={v}" for k, v in overrides.items() if v is not None)]
    if name:
        recipe = recipes.read(name, changed)
    else:
        if samples is None or workers is None:
            raise RequestError("data order: give a recipe, or --samples N and --workers K")
        content: dict = {}
        for setting in changed:
            recipes.override(content, setting)
        recipe = recipes.validate(content, "data order")
    if recipe.batch.workers == "per_rank":
        raise RequestError("batch.workers = per_rank: say for how many with --workers K")
    if worker >= recipe.batch.workers:
        raise RequestError(
            f"--worker {worker}: there are {recipe.batch.workers} workers, 0 to {recipe.batch.workers - 1}"
        )
    if epoch >= recipe.train.epochs:
        raise RequestError(f"--epoch {epoch}: the run has epochs 0 to {recipe.train.epochs - 1}")
    n_samples = samples_and_classes(recipe)[0]
    schedule = recipe.build_schedule(n_samples)
    permutation = Permutation(n_samples, recipe.seed, epoch)
    first = schedule.first_step(epoch)
    steps = [
        worker_samples(permutation, schedule.at(first + i), worker).tolist()
        for i in range(schedule.steps_in_epoch(epoch))
    ]
    return {
        "epoch": epoch,
        "worker": worker,
        "workers": recipe.batch.workers,
        "samples_total": n_samples,
        "samples": [s for step in steps for s in step],
        "steps": steps,
    }
