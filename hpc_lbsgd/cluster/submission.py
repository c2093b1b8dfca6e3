"""`submit`: jobs for a recipe, handed to sbatch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hpc_lbsgd import owner, progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.scaling import run as scaling
from hpc_lbsgd.bench.scaling.results import Folder
from hpc_lbsgd.cluster import sites
from hpc_lbsgd.cluster.jobs import Request, data_jobs, sweep_jobs, training_jobs
from hpc_lbsgd.cluster.script import Job, plain_name, render, sbatch_line
from hpc_lbsgd.errors import EXIT_DONE, RequestError, RunError
from hpc_lbsgd.runs import as_word, choose_run

SBATCH_TIMEOUT_S = 60


@dataclass(frozen=True)
class Prepared:
    """Jobs that nothing speaks against."""

    jobs: list[Job]
    texts: list[str]  # their scripts
    run: str | None  # run folder
    asked: dict | None = None  # of a sweep


def prepare(name: str, settings: list[str], site_name: str, request: Request) -> Prepared:
    """Check the request; nothing is written. Raises RequestError."""
    site, recipe = sites.read(site_name), recipes.read(name, settings)
    stem = Path(name).stem
    words = [name, *(word for setting in settings for word in ("--set", setting))]
    asked = run = None
    if not request.data:
        label = f"scaling-{plain_name(stem)}" if request.sweep else plain_name(stem)
        named = request.run and site.folder_of_run(request.run)
        run = as_word(choose_run(label, named, request.resume, Path(site.folder_of_run(site.runs))).path)
    if request.data:
        jobs = data_jobs(stem, recipe)
    elif request.sweep:
        asked = scaling.question(stem, recipe, [nodes * site.ranks for nodes in request.sweep], None)
        Folder(run).check(asked)
        jobs = sweep_jobs(stem, words, run, request, asked)
    else:
        jobs = training_jobs(stem, recipe, words, site, run, request)
    jobs = [replace(job, asked={**job.asked, **request.options()}) for job in jobs]
    return Prepared(jobs, [render(job, site, sys.executable) for job in jobs], run, asked)


def command(
    name: str, settings: list[str], site: str, request: Request, dry_run: bool, test_only: bool, as_json: bool
) -> int:
    """`submit`: prints the jobs' numbers."""
    found = prepare(name, settings, site, request)
    if dry_run:
        show(found, as_json)
        return EXIT_DONE
    if test_only:
        for job, text in zip(found.jobs, found.texts, strict=True):
            test(job, text)
        return EXIT_DONE
    numbers = queue(found)
    if as_json:
        said = [{"job": n, "nodes": job.nodes, "stage": job.stage} for n, job in zip(numbers, found.jobs, strict=True)]
        print(json.dumps({"run": found.run, "jobs": said}))
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


def queue(found: Prepared) -> list[str]:
    """Hand all jobs to sbatch, the scripts kept in the run folder; returns their numbers. All, or none."""
    numbers: list[str] = []
    folder = Path(found.run or ".")
    if found.run:
        owner.check(found.run)
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
    return numbers


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
