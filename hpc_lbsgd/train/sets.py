"""The data sets of a run on each rank: opened, staged to the node, and the same everywhere."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from hpc_lbsgd.data import loader as loaders
from hpc_lbsgd.data import stage as stages
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import together
from hpc_lbsgd.train import alike
from hpc_lbsgd.train.prepare import stage_folder


def open_all(recipe, paths: Sequence[str | None], engine) -> list:
    """A set a path, None for none. Collective."""
    found = together(engine, lambda: [loaders.open_set(recipe, path) if path else None for path in paths])
    folder = together(engine, lambda: stage_folder(recipe))
    return staged(found, folder, engine) if folder else found


def staged(sets: Sequence, folder: str, engine) -> list:
    """Packed sets as node-local copies: the first rank of each node makes them, the others wait."""
    packed = [i for i, s in enumerate(sets) if isinstance(s, Manifest) and s.shards]
    if worlds.from_environment().local_rank == 0:
        for i in packed:
            stages.stage(sets[i], folder, show=engine.rank == 0)
    engine.barrier()
    copies = {i: Manifest(stages.folder_of(sets[i], folder) / FILE_NAME) for i in packed}
    return [copies.get(i, s) for i, s in enumerate(sets)]


def refuse_other(fingerprint: str, engine) -> None:
    """A set may lie on each node's own disk, and be an older copy there. Collective."""
    found = engine.gather((socket.gethostname(), fingerprint))
    facts, hosts = [{"data": digest} for _, digest in found], [host for host, _ in found]
    alike.refuse_other(facts, hosts, "; copy the data there again")
