"""Jobs on a real Slurm of 32 nodes: they start, they survive, and they end with the same weights as one undisturbed."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from conftest import changed, command, records, write_images, write_recipe
from lab import Victim, log_of, site, submit, submitted

from hpc_lbsgd.parallel.world import World, from_environment

ROOT = Path(__file__).parents[2]
NODES = (1, 2, 4, 8, 16, 32)
STEPS = 500
# In place of Python; that the run folder is the job's is always asked in earnest
HEAD = f"""\
#!/usr/bin/env bash
case "$*" in *" own "*) exec {sys.executable} "$@" ;; esac
"""
# Says what it was given, rank by rank
STUB = (
    HEAD
    + """\
set -eu
words=("$@")
while [ "$1" != --run ]; do shift; done
env -0 > "$2/env-$SLURM_PROCID"
if [ "$SLURM_PROCID" = 0 ]; then
    printf '%s\\0' "${words[@]}" > "$2/words"
    printf '{\\n "status": "done"\\n}\\n' > "$2/status.json"
fi
"""
)


# A small model that takes its time in a job, so that the job can be hurt on the way; it hurries when `fast` is there
SLOW_MODEL = """\
import os, time
from torch import nn

class Pause(nn.Module):
    def forward(self, x):
        if "SLURM_JOB_ID" in os.environ and not os.path.exists("fast"):
            time.sleep(0.04)
        return x

def model(channels, classes):
    return nn.Sequential(Pause(), nn.Conv2d(channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "slow.py").write_text(SLOW_MODEL)
    return folder


@pytest.fixture(scope="module")
def stub(folder):
    path = folder / "stub"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def exact_recipe(small_recipe, folder):
    """The same weights on any number of ranks."""
    return changed(small_recipe, determinism="any-ranks", data__eval=None, checkpoint__steps=5, train__max_steps=10)


@pytest.fixture(scope="module")
def slow_recipe(exact_recipe, folder):
    """Long enough to be hurt on the way."""
    return changed(exact_recipe, train__epochs=STEPS, train__max_steps=STEPS, model={"name": "slow:model"},
                   batch__workers=8)  # fmt: skip


def undisturbed(recipe, folder, name):
    """Weights of the same recipe in one piece, on one rank."""
    words = ["train", write_recipe(folder / f"{name}.yaml", recipe), "--run", folder / name]
    result = command(*words, timeout=300, cwd=folder, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return weights(folder / name)


def weights(run):
    return records(run, "end")[-1]["weights_sha256"]


# ---------------------------------------------------------------- starting


@pytest.mark.parametrize("nodes", NODES)
def test_slurm_takes_the_job(lab, nodes, folder):
    result = lab.command("submit", "goyal-resnet50", "--nodes", nodes, "--site", "lab", "--test-only", cwd=folder)
    assert f"using {nodes * 8} processors" in result.stderr, result.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("template", ["train", "data", "reproduce"])
def test_slurm_takes_the_templates_by_hand(lab, template, folder):
    lab.call("sbatch", "--test-only", "--nodes=1", ROOT / "slurm" / f"{template}.sbatch", "x", cwd=folder)


def test_what_slurm_refuses_is_said(lab, folder):
    result = lab.command("submit", "goyal-resnet50", "--nodes", 64, "--site", "lab", "--test-only", check=False)
    assert result.returncode == 1 and "sbatch refused goyal-resnet50 on 64 nodes: " in result.stderr, result.stderr


def test_256_ranks_know_their_places(lab, folder, stub):
    run = folder / "places"
    (number,) = submit(lab, "goyal-resnet50", run, "--nodes", 32, "--site",
                       site(folder, python=str(stub), gpus_per_node=8))  # fmt: skip
    assert lab.wait(number)["JobState"] == "COMPLETED", log_of(lab, number)
    for rank in range(256):
        env = dict(v.split("=", 1) for v in (run / f"env-{rank}").read_text().split("\0") if "=" in v)
        assert from_environment(env) == World(rank, 256, rank % 8, 8, rank // 8)
        assert env["SLURMD_NODENAME"] == f"node{rank // 8 + 1:02d}"
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"


def test_hostile_names_run_nothing(lab, folder, stub):
    place = folder / "hostile"
    place.mkdir()
    name = "a 'b\" ; $(touch pwned) `touch pwned` %j\ntouch pwned"
    recipe, run = place / f"{name}.yaml", place / f"run {name}"
    recipe.write_text("{data: {samples: 1000}}")
    value = f"data.train={json.dumps(name)}"
    words = ["--nodes", 1, "--site", site(folder, python=str(stub), ranks_per_node=1), "--set", value]
    (number,) = submit(lab, recipe, run, *words)
    assert lab.wait(number)["JobState"] == "COMPLETED"
    given = (run / "words").read_text().split("\0")[:-1]
    assert given == ["-m", "hpc_lbsgd.cli", "train", str(recipe), "--set", value, "--run", str(run),
                     "--resume-if-exists"]  # fmt: skip
    assert (run / f"job-{number}.log").exists()
    assert not list(folder.rglob("pwned"))


def test_data_is_listed_by_a_job(lab, folder):
    write_images(folder / "my images", 8, 8)
    recipe = write_recipe(folder / "data.yaml", {"data": {"train": "my images"}})
    words = ["--data", "--site", site(folder, "data-site", ranks_per_node=1)]
    (number,) = submitted(lab.command("submit", recipe, *words, cwd=folder).stderr)
    assert lab.wait(number)["JobState"] == "COMPLETED", log_of(lab, number)
    assert list((folder / "my images").glob("manifest*"))


@pytest.fixture(scope="module")
def one_rank(exact_recipe, folder):
    return undisturbed(exact_recipe, folder, "one-rank")


@pytest.mark.parametrize(
    "launcher, engine, more",
    [("srun", "horovod", {}), ("mpirun", "horovod", {}), ("srun", "torch", {"srun_mpi": "none"})],
)
def test_real_training_on_4_nodes(lab, exact_recipe, folder, one_rank, launcher, engine, more):
    name = f"{engine}-by-{launcher}"
    recipe, run = write_recipe(folder / f"{name}.yaml", changed(exact_recipe, machine__engine=engine)), folder / name
    four = site(folder, launcher, launcher=launcher, ranks_per_node=2, exclude_interfaces=["docker0"], **more)
    (number,) = submit(lab, recipe, run, "--nodes", 4, "--site", four)
    assert lab.wait(number, 240)["JobState"] == "COMPLETED", log_of(lab, number)
    (start,) = records(run, "start")
    (environment,) = json.loads((run / "environment.json").read_text())
    assert (start["ranks"], start["engine"]) == (8, engine)
    assert [r["host"] for r in environment["ranks"]] == [f"node{i:02d}" for i in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert environment["job_id"] == str(number)
    assert weights(run) == one_rank


def test_doctor_sums_on_the_nodes_of_a_job(lab, folder):
    script, out = folder / "doctor.sh", folder / "doctor.json"
    script.write_text(f"#!/bin/sh\n{sys.executable} -m hpc_lbsgd.cli doctor --mpi --nodes --read . --json\n")
    words = ["--nodes=2", "--ntasks-per-node=2", f"--output={out}", f"--error={folder}/doctor.log", script]
    (number,) = submitted(lab.call("sbatch", *words, cwd=folder).stdout)
    lab.wait(number, 240)
    found = {f["what"]: f for f in json.loads(out.read_text())["findings"]}
    assert found["mpi sum"]["level"] == "ok", found
    assert "4 ranks on 2 nodes (node01, node02)" in found["mpi sum"]["found"]
    assert "bus bandwidth" in found["mpi sum"]["found"] and found["clock skew"]["level"] == "ok"
    assert found["nodes"]["found"].startswith("2 ranks on 2 nodes, cpu: matrix product "), found
    assert "sending to others" in found["nodes"]["found"] and "read of the data" in found["nodes"]["found"]
    assert found["slurm"]["level"] == "ok" and "pmix" in found["srun --mpi"]["found"]


# ---------------------------------------------------------------- life-cycle


WAYS = ["signal", "time_limit", "preemption", "requeue", "killed_rank", "killed_node", "killed_node"]


@pytest.mark.timeout(900)
def test_whatever_ends_a_start_the_job_ends_as_if_nothing_had_been(lab, slow_recipe, folder):
    run = folder / "hurt"
    recipe = write_recipe(folder / "hurt.yaml", slow_recipe)
    job = Victim(lab, run, *submit(lab, recipe, run, "--nodes", "2-3", "--site", site(folder, "two", ranks_per_node=1)))
    owners = set()
    for count, way in enumerate(WAYS, 1):
        job.wait_for_start(count)
        job.wait_for_new_steps(7)
        owners.add(json.loads((run / "owner.json").read_text())["owner"])
        getattr(job, way)()
        if way == "requeue":  # in the queue, with no process anywhere
            assert lab.job(job.number)["JobState"] != "RUNNING"
            refused = lab.command("train", recipe, "--run", run, "--resume", cwd=folder, check=False)
            assert refused.returncode == 2 and f"in use by Slurm job {job.number} " in refused.stderr, refused.stderr
            refused = lab.command("submit", recipe, "--run", run, "--resume", cwd=folder, check=False)
            assert refused.returncode == 2 and f"in use by Slurm job {job.number} " in refused.stderr, refused.stderr
    job.wait_for_start(len(WAYS) + 1)
    assert len(owners) == 1
    assert [start["ranks"] for start in records(run, "start")] == [3] * 6 + [2, 3]  # the seventh start: in the same job
    facts = lab.job(job.number)
    (folder / "fast").touch()
    for node in job.lost:
        assert node not in facts["NodeList"]
        lab.start_node(node)
    assert lab.wait(job.number, 120)["JobState"] == "COMPLETED", job.log()
    assert [r["step"] for r in records(run, "step")] == list(range(STEPS))
    assert [r["attempt"] for r in records(run, "event") if r["event"] == "resume"] == list(range(1, len(WAYS) + 1))
    assert weights(run) == undisturbed(slow_recipe, folder, "whole")
    assert not (run / "owner.json").exists()
    log = job.log()
    assert log.count("asked to stop at a safe point") >= 2
    assert "no rank said why" in log and f"lost {job.lost[0]}; goes on with 2 nodes" in log
    assert f"lost {job.lost[1]}; queued again without {','.join(job.lost)}" in log


def test_a_failure_that_a_rank_explains_is_the_end(lab, exact_recipe, folder):
    """And a chain stops there: the later stages are cancelled, and the log says so."""
    grows = {"schedule__kind": "increasing-batch", "schedule__milestones": [1, 2], "schedule__factor": 2.0}
    recipe = changed(exact_recipe, **grows, optim__base_lr=1e30, schedule__warmup="none")
    numbers = submit(lab, write_recipe(folder / "fails.yaml", recipe), folder / "fails", "--chain",
                     "--site", site(folder, "one", ranks_per_node=1))  # fmt: skip
    assert len(numbers) == 3
    facts = lab.wait(numbers[0])
    log = log_of(lab, numbers[0])
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), log
    assert "is not finite" in log and "failed with 1, not queued again" in log
    assert "stage 1 of 3" in log and "The later stages of the chain are cancelled" in log
    assert [lab.wait(n, 60)["JobState"] for n in numbers[1:]] == ["CANCELLED", "CANCELLED"]
    assert json.loads((folder / "fails" / "status.json").read_text())["status"] == "failed"


def test_restarts_without_progress_are_limited(lab, folder):
    stub = folder / "dies"
    stub.write_text(HEAD + "kill -9 $$\n")
    stub.chmod(0o755)
    words = ["--site", site(folder, "dies", python=str(stub), ranks_per_node=1, max_restarts=1)]
    (number,) = submit(lab, "goyal-resnet50", folder / "restarts", *words)
    facts = lab.wait(number, 120)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "2"), log_of(lab, number)
    assert "gave up after 1 restarts without a new checkpoint (the newest: none)" in log_of(lab, number)


def test_a_restart_that_fails_to_start_its_ranks_is_tried_again(lab, folder):
    """Slurm refuses a step now and then just after a node was lost: srun ends with 1, and no rank has run."""
    stub, run = folder / "bad-luck", folder / "luck"
    done = 'printf \'{\\n "status": "done"\\n}\\n\' > ' + f"{run}/status.json"
    stub.write_text(f"{HEAD}case ${{SLURM_RESTART_COUNT-}} in '') kill -9 $$ ;; 1) exit 1 ;; *) {done} ;; esac\n")
    stub.chmod(0o755)
    words = ["--site", site(folder, "luck", python=str(stub), ranks_per_node=1)]
    (number,) = submit(lab, "goyal-resnet50", run, *words)
    facts = lab.wait(number, 120)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), log_of(lab, number)


def test_a_slow_node_is_left_out_before_the_first_step(lab, folder):
    """It is named in the first start alone; what measures it on real ranks is tests/mpi/test_node_check.py's."""
    stub, run = folder / "measures", folder / "measured"
    done = 'printf \'{\n "status": "done"\n}\n\' > ' + f"{run}/status.json"
    stub.write_text(f"{HEAD}case \"$*\" in *slow-nodes*) [ $SLURM_RESTART_COUNT ] || echo $SLURMD_NODENAME ;; "
                    f"*' train '*) {done} ;; esac\n")  # fmt: skip
    stub.chmod(0o755)
    words = ["--nodes", 2, "--site", site(folder, "measures", python=str(stub), ranks_per_node=1, preflight_nodes=True)]
    (number,) = submit(lab, "goyal-resnet50", run, *words)
    facts, log = lab.wait(number, 120), log_of(lab, number)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    left_out = re.search(r"bad before the first step: (node\d+); queued again without \1", log)[1]
    assert left_out not in lab.call("scontrol", "show", "hostnames", facts["NodeList"]).stdout.split()


def test_a_cancelled_job_stays_cancelled(lab, folder):
    stub = folder / "waits"
    stub.write_text(HEAD + "sleep 60\n")
    stub.chmod(0o755)
    words = ["--site", site(folder, "waits", python=str(stub), ranks_per_node=1)]
    (number,) = submit(lab, "goyal-resnet50", folder / "cancelled", *words)
    lab.wait_for(number, lambda job: job["JobState"] == "RUNNING")
    lab.call("scancel", number)
    assert lab.wait(number)["JobState"] == "CANCELLED"
    time.sleep(3)
    assert lab.job(number)["JobState"] == "CANCELLED"


def test_of_an_array_one_task_has_the_run_and_a_dead_job_none(lab, folder):
    stub, run = folder / "busy", folder / "array"
    done = 'printf \'{\n "status": "done"\n}\n\' > ' + f"{run}/status.json"
    stub.write_text(f"{HEAD}touch {run}/started-$SLURM_JOB_ID\nsleep 8\n{done}\n")
    stub.chmod(0o755)
    shown = lab.command("submit", "goyal-resnet50", "--run", run, "--dry-run", "--site",
                        site(folder, "busy", python=str(stub), ranks_per_node=1))  # fmt: skip
    (folder / "array.sbatch").write_text(shown.stdout)
    words = ["--array=0-1", f"--output={folder}/array-%a.log", folder / "array.sbatch", "goyal-resnet50", "--run", run]
    (number,) = submitted(lab.call("sbatch", *words, cwd=folder).stdout)
    tasks = [f"{number}_{i}" for i in range(2)]
    assert sorted(lab.wait(task)["ExitCode"] for task in tasks) == ["0:0", "2:0"]
    said = "".join((folder / f"array-{i}.log").read_text() for i in range(2))
    assert said.count("in use by Slurm job") == said.count("and changed nothing in it") == 1, said
    assert len(list(run.glob("started-*"))) == 1 and not (run / "owner.json").exists()
    (again,) = submitted(lab.call("sbatch", *words[1:], cwd=folder).stdout)
    lab.wait_for(again, lambda job: (run / f"started-{again}").exists())
    lab.call("scancel", "--signal=KILL", "--full", again)  # nobody gives the folder up
    lab.wait(again)
    assert (run / "owner.json").exists()
    (last,) = submitted(lab.call("sbatch", *words[1:], cwd=folder).stdout)
    assert lab.wait(last)["JobState"] == "COMPLETED", (folder / "array-%a.log").read_text()


# ---------------------------------------------------------------- chains


def test_a_chain_on_1_2_and_4_nodes_equals_one_job(lab, exact_recipe, folder):
    grows = {"batch__workers": 4, "schedule__kind": "increasing-batch", "schedule__milestones": [1, 2],
             "schedule__factor": 2.0, "train__max_steps": None,
             "train__epochs": 3}  # fmt: skip
    grown = changed(exact_recipe, **grows)
    recipe = write_recipe(folder / "grows.yaml", grown)
    run = folder / "chain"
    numbers = submit(lab, recipe, run, "--chain", "--nodes", 1, "--site", site(folder, "chain", ranks_per_node=1))
    assert [lab.wait(n, 240)["JobState"] for n in numbers] == ["COMPLETED"] * 3, [log_of(lab, n) for n in numbers]
    assert [s["ranks"] for s in records(run, "start")] == [1, 2, 4]
    assert weights(run) == undisturbed(grown, folder, "one-job")
    steps = [r["step"] for r in records(run, "step")]
    assert steps == [r["step"] for r in records(folder / "one-job", "step")] == list(range(len(steps)))
