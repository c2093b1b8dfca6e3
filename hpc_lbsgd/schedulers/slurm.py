"""Slurm: sbatch(1), squeue(1), scontrol(1), scancel(1)."""

from __future__ import annotations

import re
from pathlib import Path

from hpc_lbsgd.schedulers.scheduler import FEATURES, HIDDEN, Scheduler, Seen, ask


class Slurm(Scheduler):
    name, title, suffix, sentinel, looks = "slurm", "Slurm", "sbatch", "#SBATCH", "squeue"
    version, ping = ("sinfo", "--version"), ("scontrol", "ping")
    by_hand = "sbatch slurm/{}"
    launchers = ("srun", "mpirun")
    can = frozenset(FEATURES)
    test = ("--test-only",)
    arrays = warns = tells_ranks = True
    exports = (
        "export SLURM_EXPORT_ENV=ALL # all of this reaches the ranks, also where sbatch was given --export=NONE",
    )

    def directives(self, wanted):
        """What comes from people is one plain word each: no shell reads these lines."""
        elastic = wanted.least is not None
        most = wanted.nodes
        values = {
            "job-name": wanted.name,
            "partition": wanted.queue,
            "account": wanted.account,
            "qos": wanted.qos,
            "nodes": f"{wanted.least}-{most}" if elastic else most,
            # Slurm (22.05) gives no more nodes than the fewest would have tasks: a range asks for cores instead
            "ntasks-per-node": None if elastic else wanted.ranks,
            "mincpus": wanted.ranks * wanted.cores if elastic else None,
            # not --gpus-per-task: every rank must see all GPUs of its node, for NCCL
            "gpus-per-node": wanted.gpus or None,
            "cpus-per-task": wanted.cores,
            "time": wanted.time,
            "signal": f"B:USR2@{wanted.warn_s}" if wanted.warn_s else None,
            "open-mode": "append",
            "output": "%x-%j.log",
            "array": f"0-{wanted.tasks - 1}" if wanted.tasks else None,
            "time-min": wanted.time_min,
            "deadline": wanted.deadline,
        }
        yield from (f"--{key}={value}" for key, value in values.items() if value is not None)
        yield "--requeue"
        if wanted.outlives_nodes:
            yield "--no-kill"
        yield from wanted.options

    def output(self, run, label="job", array=False):
        """% begins a pattern, and a backslash switches patterns off."""
        number = "%A_%a" if array else "%j"
        return f"%x-{number}.log" if not run or "\\" in run else f"{run.replace('%', '%%')}/{label}-{number}.log"

    def log_of(self, output, name, number, task=0):
        names = {"%%": "%", "%x": name, "%j": number, "%A": number, "%a": str(task)}
        return Path(re.sub("%[%xjAa]", lambda found: names[found[0]], output))

    def line(self, script, output, words, after):
        return ["sbatch", f"--output={output}", *after, script, *words]

    def after(self, starts, numbers):
        # a job whose condition can no longer be met must not wait for ever
        return [f"--dependency={':'.join([starts, *numbers])}", "--kill-on-invalid-dep=yes"]

    def number(self, said):
        return said.split("Submitted batch job ")[1].split()[0]

    def task(self, number, index):
        return f"{number}_{index}"

    def cancel(self, numbers):
        return ["scancel", *numbers]

    def look(self, job, timeout_s=30.0):
        form = ("--noheader", f"--jobs={job}", "--states=all", "--format=%T %L")
        found = ask("squeue", *form, timeout_s=timeout_s)
        if found is None or (found.returncode and "Invalid job id" not in found.stderr):
            return None
        seen = [Seen(*line.split(maxsplit=1)) for line in found.stdout.splitlines() if line.strip()]
        return seen or ([] if found.returncode else [Seen(HIDDEN)])  # PrivateData

    def job_of(self, env):
        """Of an array the very task (7_1): the array's last task has the array's number, by which Slurm means all."""
        array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
        return f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID")

    def cluster_of(self, env):
        return env.get("SLURM_CLUSTER_NAME")

    def cluster_here(self):
        result = ask("scontrol", "show", "config")
        lines = (line.split("=") for line in result.stdout.splitlines()) if result else ()
        return next((words[1].strip() for words in lines if words[0].strip() == "ClusterName"), None)

    def restart_of(self, env):
        return int(env.get("SLURM_RESTART_COUNT") or 0)

    def hosts_of(self, env):
        nodes = env.get("SLURM_JOB_NODELIST")
        found = ask("scontrol", "show", "hostnames", nodes) if nodes else None
        return found.stdout.split() if found else []

    def host_of(self, env):
        return env.get("SLURMD_NODENAME")

    def cores_of(self, env):
        return int(env["SLURM_CPUS_PER_TASK"]) if "SLURM_CPUS_PER_TASK" in env else None

    def many_nodes(self, env):
        return int(env.get("SLURM_JOB_NUM_NODES") or 1) > 1
