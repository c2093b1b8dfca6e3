"""`submit`: jobs for a recipe, handed to the batch system of a site."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpc_lbsgd import owner, progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.scaling import run as scaling
from hpc_lbsgd.bench.scaling.results import Folder
from hpc_lbsgd.cluster import bundle, forecast, sites
from hpc_lbsgd.cluster.jobs import Request, data_jobs, idle, runs_of, sweep_jobs, training_jobs
from hpc_lbsgd.cluster.script import Job, line, plain_name, render
from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.cluster.submitted import SubmittedJob
from hpc_lbsgd.errors import EXIT_DONE, RequestError, RunError
from hpc_lbsgd.runs import RESUME, as_word, choose_run

SUBMIT_TIMEOUT_S = 60


@dataclass(frozen=True)
class Prepared:
    """Jobs that nothing speaks against."""

    site: Site
    jobs: list[Job]
    texts: list[str]  # their scripts
    run: str | None  # run folder; of an array, that of its runs
    notes: list[str]  # for people
    asked: dict | None = None  # of a sweep

    def tasks(self, job: Job, number: str) -> list[SubmittedJob]:
        """What the batch system has under this number: the job, or the tasks of an array."""
        system = self.site.batch

        def submitted(number_of_task: str, run: str | None, task: int = 0) -> SubmittedJob:
            log = system.log_of(job.log, job.name, number, task)
            return SubmittedJob(number_of_task, job.nodes, run, log, system.name, job.stage)

        if job.array_values:
            runs = runs_of(self.run, job.array_key, job.array_values)
            return [submitted(system.task(number, i), run, i) for i, run in enumerate(runs)]
        return [submitted(number, folders_of(job, self.run)[0])]


def folders_of(job: Job, run: str | None) -> list[str | None]:
    """The run folders of a job, those of an array below `run`."""
    if job.array_values:
        return runs_of(run, job.array_key, job.array_values)
    return [job.words[job.words.index("--run") + 1] if job.template == "train" else run]


def submit(recipe: str, settings: Sequence[str] = (), site: str = "generic", **request) -> SubmittedJob:
    """Submit one job that trains `recipe` (a file, or the name of a shipped one), as the command `submit` does.

    settings: "key=value", as --set has them. site: a site file, or a shipped site's name. request: fields of
    `jobs.Request`, as flags of the command are called: nodes="4-32", spare=1, time="2:00:00", run="runs/mine".
    Raises RequestError before anything is submitted, RunError where the batch system refuses the job.
    """
    several = [key for key in ("array", "chain", "sweep", "data") if request.get(key)]
    if several:
        raise RequestError(f"{several[0]}: submit has one job; for arrays there is submit_array, else the command")
    (job,) = submit_all(recipe, settings, site, request)
    return job


def submit_array(
    recipe: str, array: str, settings: Sequence[str] = (), site: str = "generic", **request
) -> list[SubmittedJob]:
    """Submit a job a value of a recipe's key, such as array="seed=0-4"; returns them in this order."""
    return submit_all(recipe, settings, site, {**request, "array": array})


def submit_all(recipe: str, settings: Sequence[str], site: str, request: dict) -> list[SubmittedJob]:
    resume = RESUME if request.get("resume") else None
    return queue(prepare(str(recipe), list(settings), str(site), Request(**{**request, "resume": resume})))


def prepare(name: str, settings: list[str], site_name: str, request: Request) -> Prepared:
    """Check the request; nothing is written. Raises RequestError."""
    site, recipe = sites.read(site_name), recipes.read(name, settings)
    request.check(site)
    stem = Path(name).stem
    words = [name, *(word for setting in settings for word in ("--set", setting))]
    asked = run = None
    if not request.data:
        label = f"scaling-{plain_name(stem)}" if request.sweep else plain_name(stem)
        named = request.run and site.folder_of_run(request.run)
        # an array's runs are looked at below
        resume = None if request.array else request.resume
        runs = Path(site.folder_of_run(site.runs))
        run = as_word(choose_run(label, named, resume, runs).path)
        while not (named or resume) and Path(run).exists():  # another one was submitted in this second
            time.sleep(0.1)
            run = as_word(choose_run(label, named, resume, runs).path)
    if request.data:
        jobs = data_jobs(stem, recipe, site)
    elif request.sweep:
        asked = scaling.question(stem, recipe, [nodes * site.ranks for nodes in request.sweep], None)
        Folder(run).check(asked)
        jobs = sweep_jobs(stem, words, site, run, request, asked)
    else:
        jobs = training_jobs(stem, recipe, words, site, run, request)
    key, values = request.values
    for value, folder in zip(values, runs_of(run, key, values), strict=True):
        recipes.read(name, [*settings, f"{key}={value}"])
        choose_run(label, folder, request.resume)
    limits = {"time": request.time, "time_min": request.time_min, "deadline": request.deadline}
    jobs = [replace(job, **limits) for job in jobs]
    texts = [render(job, site, sys.executable) for job in jobs]
    told = [forecast.said(recipe, site, request, run), idle(recipe, site, request)] if len(jobs) == 1 and run else []
    told += [bundle.out_of_date(site.bundle_file)] if site.bundle else []
    return Prepared(site, jobs, texts, run, [text for text in told if text], asked)


def command(
    name: str, settings: list[str], site: str, request: Request, dry_run: bool, test_only: bool, as_json: bool
) -> int:
    """`submit`: prints the jobs' numbers."""
    found = prepare(name, settings, site, request)
    for note in found.notes:
        print(f"hpc-lbsgd: {note}", file=sys.stderr)
    if dry_run:
        show(found, as_json)
        return EXIT_DONE
    if test_only:
        found.site.batch.refuse("test", "--test-only")
        for job, text in zip(found.jobs, found.texts, strict=True):
            test(found.site, job, text)
        return EXIT_DONE
    jobs = queue(found)
    if as_json:
        print(json.dumps({"run": found.run, "jobs": [job.facts() for job in jobs]}))
    elif request.array:
        each = f"{shlex.quote(found.run)}/{request.values[0]}=*"
        print(f"run folders: {each}\nreport on all: hpc-lbsgd report {each}")
    elif found.run:
        print(f"run folder: {found.run}")
    return EXIT_DONE


def show(found: Prepared, as_json: bool) -> None:
    """What would be submitted: the command as a comment after the first line, then the script."""
    jobs, texts = found.jobs, found.texts
    if as_json:
        said = [{**asdict(job), "script": text} for job, text in zip(jobs, texts, strict=True)]
        print(json.dumps({"run": found.run, "jobs": said}))
        return
    for i, (job, text) in enumerate(zip(jobs, texts, strict=True)):
        script, site = job.script_name(found.site), found.site
        words = line(job, site, script, [f"JOB_{other.label}" for other in jobs[:i]])
        shebang, rest = text.split("\n", 1)
        comment = shlex.join(words).replace("\n", "\n# ") + (f" < {script}" if site.batch.from_stdin else "")
        print(f"{shebang}\n# {comment}\n{rest}")


def test(site: Site, job: Job, text: str) -> None:
    """Ask whether the job would be taken."""
    with tempfile.NamedTemporaryFile("w", suffix=f".{site.batch.suffix}") as script:
        script.write(text)
        script.flush()
        submits, *rest = line(job, site, script.name)
        print(call(site, [submits, *site.batch.test, *rest], job, script.name), file=sys.stderr)


def queue(found: Prepared) -> list[SubmittedJob]:
    """Hand all jobs to the batch system, the scripts kept in the run folder. All, or none."""
    site, system = found.site, found.site.batch
    numbers: list[str] = []
    submitted: list[SubmittedJob] = []
    folder = Path(found.run or ".")
    for job in found.jobs:
        for folder_of_run in folders_of(job, found.run):
            if folder_of_run:
                owner.check(folder_of_run)
    if found.asked:
        Folder(folder).claim(found.asked)  # so that the report knows what is missing
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RequestError(f"--run {folder}: cannot be written: {problem.strerror}") from None
    for job, text in zip(found.jobs, found.texts, strict=True):
        script = folder / job.script_name(site)
        if job.template == "data":
            descriptor, path = tempfile.mkstemp(suffix=f".{system.suffix}")
            os.close(descriptor)
            script = Path(path)
        script.write_text(text)
        try:
            said = call(site, line(job, site, str(script), numbers), job, str(script))
        except RunError:
            if numbers:
                subprocess.run(system.cancel(numbers), timeout=SUBMIT_TIMEOUT_S, check=False)
            raise
        finally:
            if job.template == "data":
                script.unlink()
        progress.note(said)
        numbers.append(system.number(said))
        submitted += found.tasks(job, numbers[-1])
    return submitted


def call(site: Site, words: list[str], job: Job, script: str) -> str:
    """Run the command that submits; returns what it says."""
    progress.running(words)
    system = site.batch
    try:
        with open(script) if system.from_stdin else nullcontext(subprocess.DEVNULL) as stdin:
            result = subprocess.run(words, stdin=stdin, capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S)
    except FileNotFoundError:
        raise RequestError(f"no {words[0]} on PATH: submit from a login node, or look with --dry-run") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} did not answer within {SUBMIT_TIMEOUT_S} s: is {system.title} up?") from None
    if result.returncode:
        stage = f" (stage {job.stage})" if job.stage else ""
        raise RunError(f"{words[0]} refused {job.name} on {job.node_range} nodes{stage}: {result.stderr.strip()}")
    return (result.stderr + result.stdout).strip()
