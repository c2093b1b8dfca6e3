"""`resume RUN`: go on with a run from its folder alone, as its last start ran."""

from __future__ import annotations

import os
import shlex
import socket
from argparse import Namespace
from pathlib import Path

from hpc_lbsgd.cluster import launch as launches
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.launchers import Layout
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.runs import RESUME


def ranks_of(folder: RunFolder) -> int:
    """Ranks of the run's last start, where that was on one host: this one will do. Raises RequestError for what
    is no run, and for runs over several hosts, which only their scheduler can place."""
    if not folder.exists():
        raise RequestError(f"{folder.path}: no run (no recipe.yaml in it)")
    starts = folder.starts()
    ranks = starts[-1].get("ranks") if starts else None
    ranks = ranks or [{"host": socket.gethostname()}]  # no start came as far as its first step
    hosts = sorted({r["host"] for r in ranks})
    if len(hosts) > 1:
        raise RequestError(
            f"{folder.path}: its last start ran on {len(hosts)} hosts ({', '.join(hosts[:3])} ...); go on there with "
            f"hpc-lbsgd submit {folder.recipe} --run {folder.path} --resume --nodes {len(hosts)} --site SITE, or say "
            "with --np how many ranks to start here"
        )
    return len(ranks)


def job_of(folder: RunFolder, settings: list[str], amend: list[str], as_json: bool) -> Namespace:
    """The `train` command of a resume, parsed."""
    what = {"recipe": str(folder.recipe), "settings": settings, "run": str(folder.path), "resume": RESUME}
    return Namespace(command="train", amend=amend, json=as_json, **what)


def resume(
    run: str,
    ranks: int | None,
    oversubscribe: bool,
    settings: list[str],
    amend: list[str],
    as_json: bool,
    dry_run: bool,
) -> int:
    """Start the ranks of a run again on this machine, and wait for their end. settings: keys that a resume may change
    (machine.*, checkpoint.*, train.max_steps)."""
    folder = RunFolder(Path(run))
    count = ranks or ranks_of(folder)
    home = folder.home()
    if home and home != Path.cwd():  # data and models of the recipe may be named from there
        folder = RunFolder(folder.path.absolute())
        os.chdir(home)
        if dry_run:
            print(f"cd {shlex.quote(str(home))} && ", end="")
    return launches.launch(Layout(count, None, None, oversubscribe), job_of(folder, settings, amend, as_json), dry_run)
