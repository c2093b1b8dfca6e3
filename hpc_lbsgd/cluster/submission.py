"""`submit`: jobs for a recipe, handed to sbatch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpc_lbsgd import owner, progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.scaling import run as scaling
from hpc_lbsgd.bench.scaling.results import Folder
from hpc_lbsgd.cluster import forecast, sites
from hpc_lbsgd.cluster.jobs import Request, data_jobs, idle, sweep_jobs, training_jobs
from hpc_lbsgd.cluster.script import Job, plain_name, render, sbatch_line
from hpc_lbsgd.cluster.submitted import SubmittedJob
from hpc_lbsgd.errors import EXIT_DONE, RequestError, RunError
from hpc_lbsgd.runs import RESUME, as_word, choose_run

SBATCH_TIMEOUT_S = 60


@dataclass(frozen=True)
class Prepared:
    """Jobs that nothing speaks against."""

    jobs: list[Job]
    texts: list[str]  # their scripts
    run: str | None  # run folder; of an array, that of its runs
    notes: list[str]  # for people
    asked: dict | None = None  # of a sweep

    def tasks(self, job: Job, number: str) -> list[SubmittedJob]:
        """What Slurm has under this number: the job, or the tasks of an array."""
        if not job.array_values:
            return [SubmittedJob(number, job.nodes, self.run, log_of(job, number), job.stage)]
        return [
            SubmittedJob(f"{number}_{i}", job.nodes, run, log_of(job, number, i), job.stage)
            for i, run in enumerate(runs_of(self.run, job.array_key, job.array_values))
        ]


def runs_of(run: str, key: str, values: list[str]) -> list[str]:
    """The run folders of an array, as its script names them."""
    return [f"{run}/{key}={value}" for value in values]


def log_of(job: Job, number: str, task: int = 0) -> Path:
    """As Slurm fills the name in."""
    names = {"%%": "%", "%x": job.name, "%j": number, "%A": number, "%a": str(task)}
    return Path(re.sub("%[%xjAa]", lambda found: names[found[0]], job.log))


def submit(recipe: str, settings: Sequence[str] = (), site: str = "generic", **request) -> SubmittedJob:
    """Submit one job that trains `recipe` (a file, or the name of a shipped one), as the command `submit` does.

    settings: "key=value", as --set has them. site: a site file, or a shipped site's name. request: fields of
    `jobs.Request`, as flags of the command are called: nodes="4-32", spare=1, time="2:00:00", run="runs/mine".
    Raises RequestError before anything is submitted, RunError where Slurm refuses the job.
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
        jobs = data_jobs(stem, recipe)
    elif request.sweep:
        asked = scaling.question(stem, recipe, [nodes * site.ranks for nodes in request.sweep], None)
        Folder(run).check(asked)
        jobs = sweep_jobs(stem, words, run, request, asked)
    else:
        jobs = training_jobs(stem, recipe, words, site, run, request)
    key, values = request.values
    for value, folder in zip(values, runs_of(run, key, values), strict=True):
        recipes.read(name, [*settings, f"{key}={value}"])
        choose_run(label, folder, request.resume)
    jobs = [replace(job, asked={**job.asked, **request.options()}) for job in jobs]
    texts = [render(job, site, sys.executable) for job in jobs]
    told = [forecast.said(recipe, site, request, run), idle(recipe, site, request)] if len(jobs) == 1 and run else []
    return Prepared(jobs, texts, run, [text for text in told if text], asked)


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
        for job, text in zip(found.jobs, found.texts, strict=True):
            test(job, text)
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
    """What would be submitted: the sbatch line as a comment after the first line, then the script."""
    jobs, texts = found.jobs, found.texts
    if as_json:
        said = [{**asdict(job), "script": text} for job, text in zip(jobs, texts, strict=True)]
        print(json.dumps({"run": found.run, "jobs": said}))
        return
    for i, (job, text) in enumerate(zip(jobs, texts, strict=True)):
        line = sbatch_line(job, job.script_name, job.condition([f"JOB_{other.label}" for other in jobs[:i]]))
        shebang, rest = text.split("\n", 1)
        comment = shlex.join(line).replace("\n", "\n# ")
        print(f"{shebang}\n# {comment}\n{rest}")


def test(job: Job, text: str) -> None:
    """Ask Slurm whether it would take the job."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as script:
        script.write(text)
        script.flush()
        print(call(sbatch_line(job, script.name, test_only=True), job), file=sys.stderr)


def queue(found: Prepared) -> list[SubmittedJob]:
    """Hand all jobs to sbatch, the scripts kept in the run folder. All, or none."""
    numbers: list[str] = []
    submitted: list[SubmittedJob] = []
    folder = Path(found.run or ".")
    for job in found.jobs:
        for folder_of_run in runs_of(found.run, job.array_key, job.array_values) or [found.run]:
            if folder_of_run:
                owner.check(folder_of_run)
    if found.asked:
        Folder(folder).claim(found.asked)  # so that the report knows what is missing
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RequestError(f"--run {folder}: cannot be written: {problem.strerror}") from None
    for job, text in zip(found.jobs, found.texts, strict=True):
        script = folder / job.script_name
        if job.template == "data":
            descriptor, path = tempfile.mkstemp(suffix=".sbatch")
            os.close(descriptor)
            script = Path(path)
        script.write_text(text)
        try:
            said = call(sbatch_line(job, str(script), job.condition(numbers)), job)
        except RunError:
            if numbers:
                subprocess.run(["scancel", *numbers], timeout=SBATCH_TIMEOUT_S, check=False)
            raise
        finally:
            if job.template == "data":
                script.unlink()
        progress.note(said)
        numbers.append(re.search(r"Submitted batch job (\d+)", said).group(1))
        submitted += found.tasks(job, numbers[-1])
    return submitted


def call(line: list[str], job: Job) -> str:
    """Run sbatch; returns what it says."""
    progress.running(line)
    try:
        result = subprocess.run(line, capture_output=True, text=True, timeout=SBATCH_TIMEOUT_S)
    except FileNotFoundError:
        raise RequestError("no sbatch on PATH: submit from a login node, or look with --dry-run") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"sbatch did not answer within {SBATCH_TIMEOUT_S} s: is slurmctld up (scontrol ping)?") from None
    if result.returncode:
        stage = f" (stage {job.stage})" if job.stage else ""
        raise RunError(f"sbatch refused {job.name} on {job.node_range} nodes{stage}: {result.stderr.strip()}")
    return (result.stdout + result.stderr).strip()
