"""What a request comes to: one job, or one a stage, a size, a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hpc_lbsgd.cluster import sites
from hpc_lbsgd.cluster.script import Job, plain_name
from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.data.who import samples_and_classes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.runs import RESUME
from hpc_lbsgd.schedulers.scheduler import seconds_of
from hpc_lbsgd.sections import GROWING
from hpc_lbsgd.theory.schedule import Schedule

VALUE = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"  # of an array: it names a folder
DEADLINE = r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2})?)?"
MOST_TASKS = 1000


@dataclass(frozen=True)
class Request:
    """What the user asks for. Raises RequestError for what does not go together."""

    nodes: int | str = 1  # "4-32": as many of them as are free
    spare: int = 0  # nodes more, that stand in for lost and slow ones
    grow_every_hours: float | None = None  # then it is queued again, where it has not all and some are free
    time: str | None = None  # limit of a job, as a site says it
    time_min: str | None = None  # to which the scheduler may shorten it, to start earlier
    deadline: str | None = None
    images_per_s: float | None = None  # of a rank, for the forecast
    run: str | None = None  # of an array: the folder of its runs
    resume: str | None = None  # RESUME
    array: str | None = None  # KEY=A-B or KEY=A,B: a run a value
    chain: bool = False
    sweep: list[int] | None = None  # numbers of nodes
    rounds: int | None = None  # of a sweep's measurements, and their steps; None: the benchmark's own
    steps: int | None = None
    data: bool = False

    def __post_init__(self):
        least, most = self.range
        if (self.rounds or self.steps) and not self.sweep:
            raise RequestError("--rounds and --steps go with --sweep")
        if self.resume and self.sweep:
            raise RequestError("--sweep with --resume: a sweep adds to the folder that --run names by itself")
        if self.resume and self.array and not self.run:
            raise RequestError("--array with --resume: name the folder of its runs with --run")
        several = [f"--{what}" for what in ("chain", "sweep", "data", "array") if getattr(self, what)]
        if len(several) > 1:
            raise RequestError(f"{several[0]} with {several[1]}: one of them")
        if several and not self.array and (least < most or self.spare):
            raise RequestError(
                f"{several[0]}: each of its jobs has a number of nodes of its own; leave out --spare, and give "
                f"--nodes as one number (got {self.nodes})"
            )
        if self.grow_every_hours is not None and least == most:
            raise RequestError(f"--grow-every with --nodes {self.nodes}: say to how many it may grow, such as 4-32")
        for key, value in (("--time", self.time), ("--time-min", self.time_min)):
            if value:
                sites.check_duration(key, value)
        if self.deadline and not re.fullmatch(DEADLINE, self.deadline, re.ASCII):
            raise RequestError(f"--deadline {self.deadline}: expected a time such as 2026-12-24T18:00, or a day")
        self.values  # noqa: B018 - refuses a wrong --array

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most nodes that have ranks."""
        found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", str(self.nodes), re.ASCII)
        least, most = (int(n or found[1]) for n in found.groups()) if found else (1, 0)
        if least > most:
            raise RequestError(f"--nodes {self.nodes}: expected a number, or a range such as 4-32")
        return least, most

    @cached_property
    def values(self) -> tuple[str, list[str]]:
        """The key of an array, and a value a task; ("", []) where there is no array."""
        if not self.array:
            return "", []
        key, _, text = self.array.partition("=")
        span = re.fullmatch(r"(\d+)-(\d+)", text, re.ASCII)
        values = [str(i) for i in range(int(span[1]), int(span[2]) + 1)] if span else text.split(",")
        good = re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key) and all(re.fullmatch(VALUE, v, re.ASCII) for v in values)
        if not good or not 0 < len(set(values)) == len(values) <= MOST_TASKS:
            raise RequestError(
                f"--array {self.array}: expected KEY=A-B or KEY=A,B,C, such as seed=0-4: 1 to {MOST_TASKS} words, "
                "each once"
            )
        return key, values

    def check(self, site: Site) -> None:
        """Raises RequestError for what the site's batch system cannot do."""
        least, most = self.range
        asked = {
            f"--nodes {self.nodes}": ("elastic", least < most),
            f"--spare {self.spare}": ("elastic", self.spare),
            f"--time-min {self.time_min}": ("time-min", self.time_min),
            f"--deadline {self.deadline}": ("deadline", self.deadline),
            "--chain": ("same number", self.chain),
        }
        for what, (feature, wanted) in asked.items():
            if wanted:
                site.batch.refuse(feature, what)


def refuse_short(site: Site, request: Request) -> None:
    """A limit within which the job would be asked to stop at once, and queued again for ever."""
    for what, limit in (("the time limit", request.time or site.time_limit), ("--time-min", request.time_min)):
        if limit and seconds_of(limit) <= site.warn_s:
            raise RequestError(
                f"{what}, {limit}, leaves no time: the job is asked to stop warn_s = {site.warn_s} s before its end; "
                "give a longer one, or set a smaller warn_s in the site"
            )


def training_jobs(name: str, recipe: Recipe, words: list[str], site: Site, run: str, request: Request) -> list[Job]:
    """One job, or a chain of one a stage.

    words: of `train`, without --run. A chain's job i ends where stage i does, and has as many nodes as its kn wants:
    `nodes` at the first stage, in proportion to the workers later on. What goes on with a run says --resume: where the
    run has gone meanwhile, it must not start anew. A first start leaves the flag to the script, which may be restarted.
    """
    refuse_short(site, request)
    log = site.batch.output(run)
    words = [*words, "--run", run]
    resume = [request.resume] if request.resume else []
    nodes = request.range[1]
    if not request.chain:
        job = elastic(Job("train", plain_name(name), nodes, [*words, *resume], log, run=run), request)
        return array(job, site, run, *request.values) if request.array else [job]
    settled = recipe.with_workers(nodes * site.ranks)
    if settled.schedule.kind == "adaptive-batch":
        raise RequestError("--chain: schedule.kind = adaptive-batch decides its stages while it runs; submit one job")
    schedule = settled.build_schedule(samples_and_classes(settled)[0])
    pieces = batches_of(schedule)
    done = RunFolder(run).newest_step() if request.resume else 0
    if done >= pieces[-1][1]:
        raise RequestError(f"--chain: {run} has done all its {done} steps; nothing is left to submit")
    jobs = []
    for i, (workers, last_step) in enumerate(pieces):
        if last_step <= done:
            continue
        end = [] if i == len(pieces) - 1 else ["--set", f"train.max_steps={last_step}"]
        # k is settled here: per_rank means the ranks of the first stage
        fixed = ["--set", f"batch.workers={settled.batch.workers}"] if recipe.batch.workers == "per_rank" else []
        stage, starts = f"{i + 1} of {len(pieces)}", "afterok" if jobs else ""
        words_here = [*words, *([RESUME] if i else resume), *fixed, *end]
        of_stage = -(-nodes * workers // pieces[0][0])
        job = Job("train", f"{plain_name(name)}.{i + 1}", of_stage, words_here, log, stage, str(i + 1), starts, run=run)
        jobs.append(job)
    return jobs


def idle(recipe: Recipe, site: Site, request: Request) -> str | None:
    """What to say where a job may get more ranks than there is work for."""
    workers, ranks = recipe.batch.workers, request.range[1] * site.ranks
    if workers == "per_rank" or workers >= ranks or recipe.schedule.kind in GROWING:
        return None
    return f"--nodes {request.nodes}: {ranks - workers} of {ranks} ranks have no work, for batch.workers = {workers}"


def array(job: Job, site: Site, run: str, key: str, values: list[str]) -> list[Job]:
    """The job once a value: an array of the batch system's, or a job each."""
    if site.batch.arrays:
        return [replace(job, array_key=key, array_values=values, log=site.batch.output(run, array=True))]
    jobs = []
    for value, folder in zip(values, runs_of(run, key, values), strict=True):
        words = list(job.words)
        words[words.index("--run") : words.index("--run") + 2] = ["--set", f"{key}={value}", "--run", folder]
        label = f"{key}={value}"
        jobs.append(replace(job, words=words, label=label, log=site.batch.output(run, f"job-{label}")))
    return jobs


def runs_of(run: str, key: str, values: list[str]) -> list[str]:
    """The run folders of an array, as its script names them."""
    return [f"{run}/{key}={value}" for value in values]


def elastic(job: Job, request: Request) -> Job:
    """The job with as many nodes as are free."""
    hours = request.grow_every_hours
    return replace(job, least=request.range[0], spare=request.spare, grow_every_s=hours and max(1, round(hours * 3600)))


def batches_of(schedule: Schedule) -> list[tuple[int, int]]:
    """(workers, steps done at its end) of each piece of a run with one batch; stages that only change the rate join."""
    pieces: list[tuple[int, int]] = []
    for i, stage in enumerate(schedule.stages):
        last = i + 1 == len(schedule.stages)
        end = min(
            schedule.steps, schedule.full_steps if last else schedule.first_step(schedule.stages[i + 1].first_epoch)
        )
        if pieces and (pieces[-1][0] == stage.workers or pieces[-1][1] == end):
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((stage.workers, end))
    return pieces


def sweep_jobs(name: str, words: list[str], site: Site, run: str, request: Request, asked: dict) -> list[Job]:
    """The scaling benchmark as a job a number of nodes, and a report on what they leave, whichever of them fail.

    words: of `bench scaling`, without --out. asked: see `scaling.question`; its k is the same for all sizes.
    """
    workers = asked["recipe"]["batch"]["workers"]
    words = [*words, "--set", f"batch.workers={workers}", "--out", run]
    for key in ("rounds", "steps"):
        value = getattr(request, key)
        words += [f"--{key}", str(value)] if value else []
    jobs = []
    for nodes in request.sweep:
        label = f"{nodes}-nodes"
        log = site.batch.output(run, label)
        jobs.append(Job("scaling", plain_name(f"{name}.{label}"), nodes, words, log, label=label))
    report = {"label": "report", "starts": "afterany", "one_task": True}
    name = plain_name(f"{name}.report")
    return [*jobs, Job("scaling", name, 1, ["--report", run], site.batch.output(run, "report"), **report)]


def data_jobs(name: str, recipe: Recipe, site: Site) -> list[Job]:
    """One job a folder that the recipe's data needs listed."""
    folders = [path for path in (recipe.data.train, recipe.data.eval) if path and Path(path).is_dir()]
    if not folders:
        raise RequestError(f"--data: data.train = {recipe.data.train} is no folder; there is nothing to prepare")
    job_name = plain_name(f"{name}.data")
    return [Job("data", job_name, 1, ["index", folder], site.batch.output(None), one_task=True) for folder in folders]
