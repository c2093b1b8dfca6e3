"""A job's batch script: a template, filled in for a site."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources

from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.parallel.launchers import EXPORT
from hpc_lbsgd.runs import as_word
from hpc_lbsgd.schedulers.scheduler import Wanted, seconds_of

BEGIN, END = "# ---- the site's part", "# ---- end of the site's part"
STOP_SAFELY = ("train", "reproduce")  # templates that a signal before the time limit asks to stop at a safe point


@dataclass(frozen=True)
class Job:
    """One job: a template, and what stands on the line that submits it."""

    template: str  # a file of templates/, without its suffix
    name: str
    nodes: int  # that have ranks, at most
    words: list[str]  # the script's arguments
    log: str  # as Scheduler.output says
    stage: str = ""  # of a chain: "2 of 3"
    label: str = ""  # of one job among several: its script is job-LABEL.SUFFIX
    starts: str = ""  # afterok: when the job before it is done; afterany: when all before it are over, well or not
    one_task: bool = False  # a process with a node's cores and no GPU, in place of the site's ranks
    least: int | None = None  # nodes with which it starts, and goes on when others are lost; None: all
    spare: int = 0  # nodes without ranks, to stand in for lost ones
    grow_every_s: int | None = None  # then it is queued again, where it has less than `nodes` and some are free
    array_key: str = ""  # a key of the recipe, which has another value in each task
    array_values: list[str] = field(default_factory=list)
    run: str | None = None  # the folder that its script is kept in
    time: str | None = None  # its limit, where the site's is not what is wanted
    time_min: str | None = None
    deadline: str | None = None

    @property
    def takes_what_is_free(self) -> bool:
        return self.least not in (None, self.nodes)

    @property
    def outlives_nodes(self) -> bool:
        return bool(self.spare) or self.takes_what_is_free

    @property
    def node_range(self) -> str:
        most = self.nodes + self.spare
        return f"{self.least}-{most}" if self.takes_what_is_free else str(most)

    def script_name(self, site: Site) -> str:
        return f"job-{self.label}.{site.batch.suffix}" if self.label else f"job.{site.batch.suffix}"


def template(name: str) -> str:
    return (resources.files("hpc_lbsgd.cluster") / "templates" / f"{name}.sh").read_text()


def render(job: Job, site: Site, python: str) -> str:
    """The batch script: the template with the site's part filled in, and what it asks of the batch system."""
    system = site.batch
    name = f"{job.template}.{system.suffix}"
    text = template(job.template).replace("@submit@", system.by_hand.format(name)).replace("@script@", name)
    head, rest = text.split(BEGIN, 1)
    first_line, rest = rest.split("\n", 1)
    body = rest.split(END + "\n", 1)[1]
    body = re.sub(r"^#@ (\w+)\n", lambda found: system.block(found[1]), body, flags=re.M)
    directives = [f"{system.sentinel} {words}" for words in system.directives(wanted(job, site))]
    part = [*directives, "set -euo pipefail", *loading(site), *settings(job, site, python, body)]
    return "\n".join([f"{head}{BEGIN}{first_line}", *part, f"{END}\n{body}"])


def wanted(job: Job, site: Site) -> Wanted:
    """What the job asks of its batch system."""
    return Wanted(
        name=job.name,
        nodes=job.nodes + job.spare,
        ranks=1 if job.one_task else site.ranks,
        cores=site.cores * (site.ranks if job.one_task else 1),
        time=job.time or site.time_limit,
        gpus=site.gpus_per_node if site.gpus and not job.one_task else "",
        least=job.least if job.takes_what_is_free else None,
        outlives_nodes=job.outlives_nodes,
        warn_s=site.warn_s if job.template in STOP_SAFELY else None,
        queue=site.partition,
        account=site.account,
        qos=site.qos,
        time_min=job.time_min,
        deadline=job.deadline,
        tasks=len(job.array_values),
        options=site.options,
    )


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
    yield from site.batch.exports


def settings(job: Job, site: Site, python: str, body: str) -> Iterator[str]:
    """Shell variables that the template's body uses."""
    srun_options, wrap = contained(site)
    script = "" if job.run is None else f"{job.run}/{job.script_name(site)}"
    told = site.batch.tells_ranks
    same_number = "same number" in site.batch.can
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
        "each": site.ranks if job.takes_what_is_free or not told else "",
        "cores": None if told else site.cores * (site.ranks if job.one_task else 1),
        "warn_after_s": max(1, seconds_of(job.time or site.time_limit) - site.warn_s),
        "bundle": site.bundle_file,
        "preflight": "yes" if site.preflight_nodes else "",
        "again": line(replace(job, starts=""), site, script) if script and not same_number else [],
        "least": (job.least or job.nodes) if job.outlives_nodes else "",
        "most": job.nodes if job.outlives_nodes else "",
        "grow_every_s": job.grow_every_s or "",
        "array_key": job.array_key,
        "array_values": job.array_values,
    }
    if job.words and not site.batch.takes_words:
        yield f"(($#)) || set -- {' '.join(map(one_line, job.words))}"
    for key, value in values.items():
        if value is not None and re.search(rf"\$\{{?{key}\b", body):
            yield f"{key}={in_bash(value)}"


def in_bash(value: str | int | list[str]) -> str:
    if isinstance(value, list):
        return f"({' '.join(map(one_line, value))})"
    return shlex.quote(str(value)) if value else ""


def one_line(word: str) -> str:
    """Quoted for bash: what a new line would begin with may be read as a directive."""
    if "\n" not in word:
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


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
    """As a job's name: nothing that a batch system, a shell or a file pattern would read as more than a letter."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:60].strip("_.-") or "hpc-lbsgd"


def line(job: Job, site: Site, script: str, numbers: Sequence[str] = ()) -> list[str]:
    """The command that submits a job. numbers: of the jobs submitted before it."""
    before = {"afterok": numbers[-1:], "afterany": numbers}.get(job.starts)
    after = site.batch.after(job.starts, before) if before else []
    return site.batch.line(as_word(script), job.log, job.words, after)
