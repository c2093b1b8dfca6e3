"""`reproduce`: run what is missing of an experiment, then write its table and its plot."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from hpc_lbsgd import origin, progress
from hpc_lbsgd.errors import EXIT_DONE, RequestError, RunError
from hpc_lbsgd.parallel.world import cores
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.reproduce import plots, table
from hpc_lbsgd.reproduce.cells import Cell, cells_of, cut_short
from hpc_lbsgd.reproduce.experiments import EXPERIMENTS, SCALES
from hpc_lbsgd.reproduce.runner import prepare_small, run_cells
from hpc_lbsgd.urls import is_url

SEEDS = 3


def reproduce(
    name: str,
    scale_name: str,
    seeds: int | None,
    settings: list[str],
    out: Path | None,
    ranks: int | None,
    jobs: int | None,
    oversubscribe: bool,
    list_only: bool,
    as_json: bool,
    quick: bool = False,
) -> int:
    """Run the experiment's missing cells and write OUT/NAME.{md,json,png}; returns the exit code.

    ranks, jobs: ranks of a run and runs side by side; the default keeps every core or GPU of this machine busy.
    """
    experiment, scale = EXPERIMENTS[name], SCALES[scale_name]
    out = out or Path("runs/reproduce") / (f"{scale.name}-quick" if quick else scale.name)
    seeds = seeds or (1 if quick else SEEDS)
    cells = cells_of(experiment.rows(scale), seeds, settings, out / "cells", quick)
    ranks, jobs = layout(ranks, jobs)
    if list_only:
        show_cells(cells, as_json)
        return EXIT_DONE
    check_data(cells[0].recipe)
    progress.note(
        f"{experiment.title}: {len(cells)} runs, {sum(c.finished for c in cells)} finished; {jobs} side by side of "
        f"{ranks} rank{'s' if ranks > 1 else ''}; runs and logs in {out / 'cells'}"
    )
    code = run_cells(cells, ranks, jobs, oversubscribe)
    if code != EXIT_DONE:
        finished = sum(c.finished for c in cells)
        progress.note(f"stopped with {finished} of {len(cells)} runs finished; the same command goes on from here")
        return code
    report = table.summarise(experiment, scale, cells, seeds)
    report.facts["cut_short"] = cut_short(cells, quick)
    command = shlex.join(command_of(name, scale.name, seeds, settings, quick))
    made = {"command": command, "commit": origin.commit()}
    content = table.as_json(report) | made
    text = table.markdown(experiment, report, command, conditions(cells))
    table.write(out, experiment, text, json.dumps(content, indent=1) + "\n")
    plots.draw(out / f"{name}.png", experiment, scale, report, made)
    if as_json:
        print(json.dumps(content))
    else:
        print(f"{text}\nwritten: {out / name}.md, .json, .png")
    return EXIT_DONE


def layout(ranks: int | None, jobs: int | None) -> tuple[int, int]:
    """(ranks of a run, runs side by side): small networks on CPUs run best one a core; GPUs work together."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = ranks or max(1, gpus)
    return ranks, jobs or (1 if gpus else max(1, cores() // ranks))


def check_data(recipe: Recipe) -> None:
    """The data is there, or can be made; a missing set is said once, not once a run."""
    prepare_small(recipe)
    for key, path in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if path and not is_url(path) and not Path(path).exists():
            raise RequestError(
                f"data.{key} = {path}: no such folder or manifest; put the images there, or name their place with "
                f"--set data.{key}=PATH"
            )


def command_of(name: str, scale: str, seeds: int, settings: list[str], quick: bool = False) -> list[str]:
    line = ["hpc-lbsgd", "reproduce", name, "--scale", scale, "--seeds", str(seeds), *(["--quick"] if quick else [])]
    for setting in settings:
        line += ["--set", setting]
    return line


def conditions(cells: list[Cell]) -> list[str]:
    """Where and on what the table was made, from the environment record of its first run."""
    cell = cells[0]
    epochs = sorted({c.recipe.train.epochs for c in cells})
    length = f"{epochs[0]} epochs" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]} epochs by row"
    starts = cell.folder.starts()
    if not starts:
        raise RunError(
            f"{cell.folder.environment}: gone or damaged; remove this run, and the same command makes it anew"
        )
    facts = starts[-1]
    data, model = cell.recipe.data, cell.recipe.model
    return [
        f"data: {data.train}, {data.samples} images; test: {data.eval}",
        f"model: {model.name}, n = {cell.recipe.batch.samples_per_worker}, {length}, "
        f"determinism {cell.recipe.determinism}",
        f"torch {facts['versions']['torch']}, horovod {facts['versions']['horovod']}, {facts['ranks'][0]['device']}",
    ]


def show_cells(cells: list[Cell], as_json: bool) -> None:
    found = [
        {
            "row": c.row.label,
            "seed": c.seed,
            "folder": str(c.folder.path),
            "finished": c.finished,
            "steps": c.recipe.build_schedule(c.recipe.data.samples).steps,
        }
        for c in cells
    ]
    if as_json:
        print(json.dumps({"runs": found}))
        return
    for f in found:
        mark = "finished" if f["finished"] else "to run"
        print(f"{f['row']:36s} seed {f['seed']}  {f['steps']:8d} steps  {mark:9s} {f['folder']}")
