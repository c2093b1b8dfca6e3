"""The three rates of a recipe on the ranks of this job, in turn. Under mpirun or srun every process is a rank."""

from __future__ import annotations

import sys
from statistics import median

from hpc_lbsgd import progress
from hpc_lbsgd.bench.core.spread import by_round
from hpc_lbsgd.bench.core.timing import RATES, Bench, measured, training_set
from hpc_lbsgd.bench.core.turns import there_and_back
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel.agree import together
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.train.job import meet


def rates(recipe: Recipe, rounds: int, steps: int) -> dict | None:
    """Medians and spread of the three rates over `rounds` of `steps` steps; on rank 0, None elsewhere. Collective."""
    if training_set(recipe) is None:
        raise RequestError("data.train is not set: name a folder of class folders, or a manifest")
    device, engine = meet(recipe)
    recipe = measured(recipe.with_workers(engine.size))
    try:
        bench = together(engine, lambda: Bench(recipe, engine, device))
        bench.replica.synchronise()
        values: dict[str, list[float]] = {what: [] for what in RATES}
        with progress.bar(total=rounds * len(RATES), show=engine.rank == 0, unit="run") as bar:
            for number in range(rounds):
                for what in there_and_back(RATES, number):
                    values[what].append(bench.time(what, steps).images_per_s)
                    bar.update(1)
        if engine.rank:
            return None
        return summary(recipe, engine, device, steps, values)
    finally:
        sys.stdout.flush()
        engine.close()


def summary(recipe: Recipe, engine, device, steps: int, values: dict[str, list[float]]) -> dict:
    return {
        "data": recipe.data.dataset or recipe.data.train.rstrip("/"),
        "engine": engine.name,
        "ranks": engine.size,
        "device": str(device),
        "global_batch": recipe.batch.kn,
        "steps_a_round": steps,
        "rates": {
            what: {"images_per_s": median(v), "lowest": min(v), "highest": max(v), "values": v}
            for what, v in values.items()
        },
        "end_to_end_over_synthetic": median(by_round(values["end-to-end"], values["synthetic"])),
    }
