"""`submit`: fill in a template of slurm/ for a site, and hand it to sbatch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from hpc_lbsgd import owner, progress
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.bench.scaling import run as scaling
from hpc_lbsgd.bench.scaling.results import Folder
from hpc_lbsgd.cluster import sites
from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.data.who import samples_and_classes
from hpc_lbsgd.errors import EXIT_DONE, RequestError, RunError
from hpc_lbsgd.parallel.launchers import EXPORT
from hpc_lbsgd.recipe import Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.runs import RESUME, as_word, choose_run
from hpc_lbsgd.theory.schedule import Schedule

BEGIN, END = "# ---- the site's part", "# ---- end of the site's part"
SBATCH_TIMEOUT_S = 60
STOP_SAFELY = ("train", "reproduce")  # templates that a signal before the time limit asks to stop at a safe point


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    nodes: int
    time_limit: str | None = None
    run: str | None = None
    resume: str | None = None  # RESUME
    chain: bool = False
    sweep: list[int] | None = None  # numbers of nodes
    rounds: int | None = None  # of a sweep's measurements, and their steps; None: the benchmark's own
    steps: int | None = None
    data: bool = False
    dry_run: bool = False
    test_only: bool = False


@dataclass(frozen=True)
class Job:
    """One job: a template, and what stands on its sbatch line."""

    template: str  # a file of slurm/, without its suffix
    name: str
    nodes: int
    words: list[str]  # the script's arguments
    log: str
    stage: str = ""  # of a chain: "2 of 3"
    label: str = ""  # of one job among several: its script is job-LABEL.sbatch
    starts: str = ""  # afterok: when the job before it is done; afterany: when all before it are over, well or not
    one_task: bool = False  # a process with a node's cores and no GPU, in place of the site's ranks

    @property
    def script_name(self) -> str:
        return f"job-{self.label}.sbatch" if self.label else "job.sbatch"

    def condition(self, numbers: list[str]) -> str | None:
        """sbatch's --dependency, from the numbers of the jobs submitted before it."""
        before = {"afterok": numbers[-1:], "afterany": numbers}.get(self.starts)
        return ":".join([self.starts, *before]) if before else None


# ---------------------------------------------------------------- text


def template(name: str) -> str:
    return (resources.files("hpc_lbsgd.cluster") / "templates" / f"{name}.sbatch").read_text()


def render(job: Job, site: Site, python: str, time_limit: str | None = None) -> str:
    """The batch script: the template with the site's part filled in."""
    head, rest = template(job.template).split(BEGIN, 1)
    first_line, rest = rest.split("\n", 1)
    body = rest.split(END + "\n", 1)[1]
    part = [*directives(job, site, time_limit), "set -euo pipefail", *loading(site), *settings(job, site, python, body)]
    return "\n".join([f"{head}{BEGIN}{first_line}", *part, f"{END}\n{body}"])


def directives(job: Job, site: Site, time_limit: str | None) -> Iterator[str]:
    """#SBATCH lines. Slurm reads them, no shell; what comes from people is one plain word each."""
    values = {
        "job-name": job.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": job.nodes,
        "ntasks-per-node": 1 if job.one_task else site.ranks,
        # not --gpus-per-task: every rank must see all GPUs of its node, for NCCL
        "gpus-per-node": site.gpus_per_node if site.gpus and not job.one_task else None,
        "cpus-per-task": site.cores * (site.ranks if job.one_task else 1),
        "time": time_limit or site.time_limit,
        "signal": f"B:USR2@{site.warn_s}" if job.template in STOP_SAFELY else None,
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    for key, value in values.items():
        if value is not None:
            yield f"#SBATCH --{key}={value}"
    yield "#SBATCH --requeue"
    for option in site.options:
        yield f"#SBATCH {option}"


def loading(site: Site) -> Iterator[str]:
    """Modules and environment."""
    if site.modules:
        yield "set +eu # what sites define uses unset variables"
        yield "# shellcheck source=/dev/null"
        yield "command -v module >/dev/null || . /etc/profile # a job's shell is no login shell"
        yield "set -e"
        for module in site.modules:
            yield f"module load {shlex.quote(module)}"
        yield "set -u"
    for key, value in {**site.fabric(), **site.storage(), **site.environment}.items():
        yield f"export {key}={shlex.quote(value)}"
    if site.environment:
        yield f"export {EXPORT}={shlex.quote(','.join(site.environment))}"
    yield "export SLURM_EXPORT_ENV=ALL # all of this reaches the ranks, also where sbatch was given --export=NONE"


def settings(job: Job, site: Site, python: str, body: str) -> Iterator[str]:
    """Shell variables that the template's body uses."""
    srun_options, wrap = contained(site)
    values = {
        "python": site.python or ("python" if site.container else python),
        "launcher": site.launcher,
        "mpi": site.mpi,
        "wire_up": site.wire_up,
        "host_suffix": site.host_suffix,
        "srun_options": srun_options,
        "wrap": wrap,
        "max_restarts": site.max_restarts,
        "chain": job.stage,
    }
    for key, value in values.items():
        if re.search(rf"\$\{{?{key}\b", body):
            quoted = f"({shlex.join(value)})" if isinstance(value, list) else shlex.quote(str(value)) if value else ""
            yield f"{key}={quoted}"


def contained(site: Site) -> tuple[list[str], list[str]]:
    """(options of srun, words before the program) that put ranks into the site's container."""
    box = site.container
    if box is None:
        return [], []
    if box.runtime == "pyxis":
        mounts = [f"--container-mounts={','.join(box.mounts)}"] if box.mounts else []
        return [f"--container-image={box.image}", *mounts], []
    binds = [word for mount in box.mounts for word in ("--bind", mount)]
    return [], [box.runtime, "exec", "--nv", *binds, box.image]


def plain_name(text: str) -> str:
    """As a job's name: nothing that Slurm, a shell or a file pattern would read as more than a letter."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:60].strip("_.-") or "hpc-lbsgd"


def log_path(run: str, label: str = "job") -> str:
    """As sbatch takes it: % starts a pattern, and a backslash switches patterns off."""
    return "%x-%j.log" if "\\" in run else f"{run.replace('%', '%%')}/{label}-%j.log"


def sbatch_line(job: Job, script: str, condition: str | None = None, test_only: bool = False) -> list[str]:
    options = [f"--output={job.log}"]
    if condition:
        # a job whose condition can no longer be met must not wait for ever
        options += [f"--dependency={condition}", "--kill-on-invalid-dep=yes"]
    if test_only:
        options += ["--test-only"]
    return ["sbatch", *options, as_word(script), *job.words]


# ---------------------------------------------------------------- what to submit


def training_jobs(name: str, recipe: Recipe, words: list[str], site: Site, run: str, request: Request) -> list[Job]:
    """One job, or a chain of one a stage.

    words: of `train`, without --run. A chain's job i ends where stage i does, and has as many nodes as its kn wants:
    `nodes` at the first stage, in proportion to the workers later on. What goes on with a run says --resume: where the
    run has gone meanwhile, it must not start anew. A first start leaves the flag to the script, which may be restarted.
    """
    log = log_path(run)
    words = [*words, "--run", run]
    resume = [request.resume] if request.resume else []
    if not request.chain:
        return [Job("train", plain_name(name), request.nodes, [*words, *resume], log)]
    settled = recipe.with_workers(request.nodes * site.ranks)
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
        nodes = -(-request.nodes * workers // pieces[0][0])
        end = [] if i == len(pieces) - 1 else ["--set", f"train.max_steps={last_step}"]
        # k is settled here: per_rank means the ranks of the first stage
        fixed = ["--set", f"batch.workers={settled.batch.workers}"] if recipe.batch.workers == "per_rank" else []
        stage, starts = f"{i + 1} of {len(pieces)}", "afterok" if jobs else ""
        words_here = [*words, *([RESUME] if i else resume), *fixed, *end]
        jobs.append(Job("train", f"{plain_name(name)}.{i + 1}", nodes, words_here, log, stage, str(i + 1), starts))
    return jobs


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


def sweep_jobs(name: str, words: list[str], run: str, request: Request, asked: dict) -> list[Job]:
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
        jobs.append(Job("scaling", plain_name(f"{name}.{label}"), nodes, words, log_path(run, label), label=label))
    report = {"label": "report", "starts": "afterany", "one_task": True}
    name = plain_name(f"{name}.report")
    return [*jobs, Job("scaling", name, 1, ["--report", run], log_path(run, "report"), **report)]


def data_jobs(name: str, recipe: Recipe) -> list[Job]:
    """One job a folder that the recipe's data needs listed."""
    folders = [path for path in (recipe.data.train, recipe.data.eval) if path and Path(path).is_dir()]
    if not folders:
        raise RequestError(f"--data: data.train = {recipe.data.train} is no folder; there is nothing to prepare")
    job_name = plain_name(f"{name}.data")
    return [Job("data", job_name, 1, ["index", folder], "%x-%j.log", one_task=True) for folder in folders]


# ---------------------------------------------------------------- the command


def submit(name: str, settings: list[str], site_name: str, request: Request, as_json: bool) -> int:
    """Submit a recipe; prints the jobs' numbers. Raises RequestError before anything is submitted."""
    site, recipe = sites.read(site_name), recipes.read(name, settings)
    if (request.rounds or request.steps) and not request.sweep:
        raise RequestError("--rounds and --steps go with --sweep")
    if request.time_limit:
        sites.check_duration("--time", request.time_limit)
    stem = Path(name).stem
    words = [name, *(word for setting in settings for word in ("--set", setting))]
    if request.resume and request.sweep:
        raise RequestError("--sweep with --resume: a sweep adds to the folder that --run names by itself")
    asked = run = None
    if not request.data:
        label = f"scaling-{plain_name(stem)}" if request.sweep else plain_name(stem)
        named = request.run and site.folder_of_run(request.run)
        run = as_word(choose_run(label, named, request.resume, Path(site.folder_of_run(site.runs))).path)
        if not (request.dry_run or request.test_only):
            owner.check(run)
    if request.data:
        jobs = data_jobs(stem, recipe)
    elif request.sweep:
        asked = scaling.question(stem, recipe, [nodes * site.ranks for nodes in request.sweep], None)
        Folder(run).check(asked)
        jobs = sweep_jobs(stem, words, run, request, asked)
    else:
        jobs = training_jobs(stem, recipe, words, site, run, request)
    texts = [render(job, site, sys.executable, request.time_limit) for job in jobs]
    if request.dry_run:
        show(jobs, texts, run, as_json)
        return EXIT_DONE
    if request.test_only:
        for job, text in zip(jobs, texts, strict=True):
            test(job, text)
        return EXIT_DONE
    if asked:
        Folder(run).claim(asked)  # so that the report knows what is missing
    numbers = queue(jobs, texts, Path(run or "."))
    if as_json:
        found = [{"job": n, "nodes": job.nodes, "stage": job.stage} for n, job in zip(numbers, jobs, strict=True)]
        print(json.dumps({"run": run, "jobs": found}))
    elif run:
        print(f"run folder: {run}")
    return EXIT_DONE


def show(jobs: list[Job], texts: list[str], run: str | None, as_json: bool) -> None:
    """What would be submitted: the sbatch line as a comment after the first line, then the script."""
    if as_json:
        found = [{**asdict(job), "script": text} for job, text in zip(jobs, texts, strict=True)]
        print(json.dumps({"run": run, "jobs": found}))
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


def queue(jobs: list[Job], texts: list[str], folder: Path) -> list[str]:
    """Hand all jobs to sbatch, the scripts kept in the run folder; returns their numbers. All, or none."""
    numbers: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RequestError(f"--run {folder}: cannot be written: {problem.strerror}") from None
    for job, text in zip(jobs, texts, strict=True):
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
        raise RunError(f"sbatch refused {job.name} on {job.nodes} nodes{stage}: {result.stderr.strip()}")
    return (result.stdout + result.stderr).strip()
