"""The data sets of a run on each rank: opened, staged to the node or kept there in part, and the same everywhere."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpc_lbsgd.data import kept
from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data import stage as stages
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.data.order import NextUse
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import together
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.theory.schedule import Schedule
from hpc_lbsgd.train import alike
from hpc_lbsgd.train.prepare import stage_folder


def open_all(recipe: Recipe, paths: Sequence[str | None], engine) -> list:
    """A set a path, None for none. Collective."""
    found = together(engine, lambda: [loaders.open_set(recipe, path) if path else None for path in paths])
    folder = together(engine, lambda: stage_folder(recipe))
    if not folder:
        return found
    in_part = kept.in_part(found, recipe.machine.stage_gb)
    room_gb = kept.left(found, recipe.machine.stage_gb)
    rest = staged([None if part else s for s, part in zip(found, in_part, strict=True)], folder, engine)
    keep([s for s, part in zip(found, in_part, strict=True) if part], Path(folder), room_gb, engine)
    return [s if part else other for s, part, other in zip(found, in_part, rest, strict=True)]


def staged(sets: Sequence, folder: str, engine) -> list:
    """Packed sets as node-local copies: the first rank of each node makes them, the others wait."""
    packed = [i for i, s in enumerate(sets) if isinstance(s, Manifest) and s.shards]
    if worlds.from_environment().local_rank == 0:
        for i in packed:
            stages.stage(sets[i], folder, show=engine.rank == 0)
    engine.barrier()
    copies = {i: Manifest(stages.folder_of(sets[i], folder) / FILE_NAME) for i in packed}
    return [copies.get(i, s) for i, s in enumerate(sets)]


def keep(sets: Sequence[Manifest], folder: Path, stage_gb: float | None, engine) -> None:
    """Have samples of these sets kept on the node, within one bound. Collective."""
    world = worlds.from_environment()

    def begin() -> None:
        if sets and world.local_rank == 0:
            kept.sweep(folder, sets)

    together(engine, begin)
    together(engine, lambda: kept.begin(sets, folder, stage_gb, world.local_rank, world.local_size))


def foresee(train, evaluation, schedule: Schedule, seed: int, step: int, engine) -> None:
    """Say of what is kept when it is needed again; the run goes on at this step. Collective."""
    if isinstance(train, Manifest) and train.kept:
        host = socket.gethostname()
        here = np.array([other == host for other in engine.gather(host)])
        epoch = schedule.at(step).epoch if step < schedule.steps else schedule.epochs
        train.kept.foresee(NextUse(schedule, seed, here), epoch)
    if isinstance(evaluation, Manifest) and evaluation.kept:  # in turn: the first ones stay, or none would be found
        evaluation.kept.foresee(lambda epoch, samples: samples + kept.IN_TURN, 0)


def refuse_other(fingerprint: str, engine) -> None:
    """A set may lie on each node's own disk, and be an older copy there. Collective."""
    found = engine.gather((socket.gethostname(), fingerprint))
    facts, hosts = [{"data": digest} for _, digest in found], [host for host, _ in found]
    alike.refuse_other(facts, hosts, "; copy the data there again")
