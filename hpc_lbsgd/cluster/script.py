"""A job's batch script: a template of slurm/, filled in for a site."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources

from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.parallel.launchers import EXPORT
from hpc_lbsgd.runs import as_word

BEGIN, END = "# ---- the site's part", "# ---- end of the site's part"
STOP_SAFELY = ("train", "reproduce")  # templates that a signal before the time limit asks to stop at a safe point


@dataclass(frozen=True)
class Job:
    """One job: a template, and what stands on its sbatch line."""

    template: str  # a file of slurm/, without its suffix
    name: str
    nodes: int  # that have ranks, at most
    words: list[str]  # the script's arguments
    log: str
    stage: str = ""  # of a chain: "2 of 3"
    label: str = ""  # of one job among several: its script is job-LABEL.sbatch
    starts: str = ""  # afterok: when the job before it is done; afterany: when all before it are over, well or not
    one_task: bool = False  # a process with a node's cores and no GPU, in place of the site's ranks
    least: int | None = None  # nodes with which it starts, and goes on when others are lost; None: all
    spare: int = 0  # nodes without ranks, to stand in for lost ones
    grow_every_s: int | None = None  # then it is queued again, where it has less than `nodes` and some are free
    array_key: str = ""  # a key of the recipe, which has another value in each task
    array_values: list[str] = field(default_factory=list)
    asked: dict[str, str] = field(default_factory=dict)  # sbatch's options, where the site's are not what is wanted

    @property
    def takes_what_is_free(self) -> bool:
        return self.least not in (None, self.nodes)

    @property
    def outlives_nodes(self) -> bool:
        return bool(self.spare) or self.takes_what_is_free

    @property
    def node_range(self) -> str:
        """As sbatch's --nodes has it."""
        most = self.nodes + self.spare
        return f"{self.least}-{most}" if self.takes_what_is_free else str(most)

    @property
    def script_name(self) -> str:
        return f"job-{self.label}.sbatch" if self.label else "job.sbatch"

    def condition(self, numbers: list[str]) -> str | None:
        """sbatch's --dependency, from the numbers of the jobs submitted before it."""
        before = {"afterok": numbers[-1:], "afterany": numbers}.get(self.starts)
        return ":".join([self.starts, *before]) if before else None


def template(name: str) -> str:
    return (resources.files("hpc_lbsgd.cluster") / "templates" / f"{name}.sbatch").read_text()


def render(job: Job, site: Site, python: str) -> str:
    """The batch script: the template with the site's part filled in."""
    head, rest = template(job.template).split(BEGIN, 1)
    first_line, rest = rest.split("\n", 1)
    body = rest.split(END + "\n", 1)[1]
    part = [*directives(job, site), "set -euo pipefail", *loading(site), *settings(job, site, python, body)]
    return "\n".join([f"{head}{BEGIN}{first_line}", *part, f"{END}\n{body}"])


def directives(job: Job, site: Site) -> Iterator[str]:
    """#SBATCH lines. Slurm reads them, no shell; what comes from people is one plain word each."""
    values = {
        "job-name": job.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": job.node_range,
        # Slurm (22.05) gives no more nodes than the fewest would have tasks: a range asks for cores instead
        "ntasks-per-node": 1 if job.one_task else None if job.takes_what_is_free else site.ranks,
        "mincpus": site.ranks * site.cores if job.takes_what_is_free else None,
        # not --gpus-per-task: every rank must see all GPUs of its node, for NCCL
        "gpus-per-node": site.gpus_per_node if site.gpus and not job.one_task else None,
        "cpus-per-task": site.cores * (site.ranks if job.one_task else 1),
        "time": site.time_limit,
        "signal": f"B:USR2@{site.warn_s}" if job.template in STOP_SAFELY else None,
        "open-mode": "append",
        "output": "%x-%j.log",
        **job.asked,
    }
    for key, value in values.items():
        if value is not None:
            yield f"#SBATCH --{key}={value}"
    yield "#SBATCH --requeue"
    if job.outlives_nodes:
        yield "#SBATCH --no-kill"
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
        "each": site.ranks if job.takes_what_is_free else "",
        "least": (job.least or job.nodes) if job.outlives_nodes else "",
        "most": job.nodes if job.outlives_nodes else "",
        "grow_every_s": job.grow_every_s,
        "array_key": job.array_key,
        "array_values": job.array_values,
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


def log_path(run: str, label: str = "job", number: str = "%j") -> str:
    """As sbatch takes it: % starts a pattern, and a backslash switches patterns off."""
    return f"%x-{number}.log" if "\\" in run else f"{run.replace('%', '%%')}/{label}-{number}.log"


def sbatch_line(job: Job, script: str, condition: str | None = None, test_only: bool = False) -> list[str]:
    options = [f"--output={job.log}"]
    if condition:
        # a job whose condition can no longer be met must not wait for ever
        options += [f"--dependency={condition}", "--kill-on-invalid-dep=yes"]
    if test_only:
        options += ["--test-only"]
    return ["sbatch", *options, as_word(script), *job.words]
