"""What a job will have reached when its time is over, where a rate is known."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from statistics import median

from hpc_lbsgd.cluster.jobs import Request
from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.data.order import passes_of_rank
from hpc_lbsgd.data.who import samples_and_classes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Recipe, load_resolved
from hpc_lbsgd.records import RunFolder, read_metrics
from hpc_lbsgd.schedulers.scheduler import seconds_of
from hpc_lbsgd.theory.schedule import Schedule


def said(recipe: Recipe, site: Site, request: Request, run: str) -> str | None:
    """One line for people; None where no rate is known. `run` may have been there before."""
    folder = RunFolder(Path(run))
    rate, source = request.images_per_s, "as you say"
    if rate is None:
        rate, source = rate_of(folder), f"as {run} had"
    if rate is None:
        return None
    if folder.exists():
        recipe = load_resolved(folder.recipe)
    try:
        samples = samples_and_classes(recipe)[0]
    except RequestError:
        return None
    now = datetime.now()
    end = now + timedelta(seconds=seconds_of(request.time or site.time_limit))
    if request.deadline:
        end = min(end, datetime.fromisoformat(request.deadline))
    done, reached = folder.newest_step(), []
    for nodes in request.range:
        ranks = nodes * site.ranks
        schedule = recipe.with_workers(ranks).build_schedule(samples)
        reached.append((step_after(schedule, done, ranks, rate, (end - now).total_seconds()), schedule))
    words = [f"step {step:,} of {s.steps:,} (epoch {epochs(s, step):.3g} of {s.epochs})" for step, s in reached]
    least, most = request.range
    what = words[0] if least == most else f"{words[0]} on {least} nodes, {words[1]} on {most}"
    return (
        f"by {end:%Y-%m-%d %H:%M}, started now: {what}, at {rate:,.4g} images/s a rank {source}, waits for sums apart"
    )


def rate_of(folder: RunFolder) -> float | None:
    """Images a second and rank with samples, of the run's last start: the median over its steps."""
    rates: list[float] = []
    ranks = 1
    for record in read_metrics(folder.metrics):
        if record["kind"] == "start":
            rates, ranks = [], min(record.get("ranks", 1), record.get("workers", 1))
        elif record["kind"] == "step" and record.get("images_per_s"):
            rates.append(record["images_per_s"] / ranks)
    return median(rates) if rates else None


def step_after(schedule: Schedule, first: int, ranks: int, rate: float, seconds: float) -> int:
    """Steps done after so long, from `first` on: a step takes as long as the rank with the most workers."""
    for stage, begin, stop in schedule.spans():
        begin, stop = max(begin, first), min(stop, schedule.steps)
        step_s = len(passes_of_rank(stage.workers, 0, ranks, 1)) * schedule.samples_per_worker / rate
        if begin >= stop:
            continue
        if (stop - begin) * step_s > seconds:
            return begin + int(seconds / step_s)
        seconds -= (stop - begin) * step_s
    return schedule.steps


def epochs(schedule: Schedule, step: int) -> float:
    """Done after `step` steps."""
    if not step:
        return 0.0
    last = schedule.at(step - 1)
    return last.epoch + (last.first + last.count) / schedule.samples
