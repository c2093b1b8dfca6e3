"""Writes slurm/*.sbatch as `submit --site generic` would: run it after a change of script.py."""

from pathlib import Path

from hpc_lbsgd.cluster import sites
from hpc_lbsgd.cluster.script import Job, render

FOLDER = Path(__file__).parents[1] / "slurm"


def by_hand(name: str) -> str:
    """The template as people use it by hand: one node of the generic site, the Python that is active."""
    return render(Job(name, "hpc-lbsgd", 1, [], "", one_task=name == "data"), sites.read("generic"), "python")


if __name__ == "__main__":
    for template in (Path(__file__).parents[1] / "hpc_lbsgd" / "cluster" / "templates").glob("*.sh"):
        (FOLDER / f"{template.stem}.sbatch").write_text(by_hand(template.stem))
