"""What train.sbatch asks of Slurm, with programs in Slurm's place that answer as told."""

import os
import subprocess

import pytest

from hpc_lbsgd import yaml12
from hpc_lbsgd.cluster import sites
from hpc_lbsgd.cluster.script import Job, render

JOB = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1",
       "SLURMD_NODENAME": "n1"}  # fmt: skip
ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}


def run_script(
    folder,
    status="",
    code=0,
    text="{gpus_per_node: 8}",
    python="true",
    run="run",
    more=(),
    result="run",
    job=None,
    **env,
):
    """(exit code, what it said). Slurm's controller is away for the first two questions; `asked` has all of them."""
    ended = f'printf \'{{\n "status": "{status}"\n}}\n\' >./{result}/status.json; ' if status else ""
    for name, body in (
        ("srun", f'case "$*" in *" true") exit 0 ;; *" own "*) echo me; exit 0 ;; esac\n{ended}exit {code}'),
        ("squeue", "n=$(cat n 2>/dev/null || echo 0); echo $((n+1)) >n\n[ $n -gt 1 ] || exit 1; echo RUNNING"),
        ("scontrol", '[ "$1" != ping ] || { [ "$(cat n)" -gt 1 ]; exit; }\n[ "$2" != hostnames ] || echo n1'),
    ):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>asked\n{body}\n')
        (folder / name).chmod(0o755)
    (folder / "job.sbatch").write_text(
        render(
            Job("train", "x", 1, [], "", **(job or {})), sites.Site.model_validate(yaml12.mapping(text, "site")), python
        )
    )
    found = subprocess.run(
        ["bash", "job.sbatch", "r.yaml", f"--run={run}", *more], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**os.environ, **JOB, **env, "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    return found.returncode, found.stderr, (folder / "asked").read_text()


def elastic(folder, *starts, lost=True, nodes_here=4, up="", measure="", unpack="", restarts=0, **keys):
    """What the script says, and what it asked of Slurm. Four nodes, two ranks each; `starts`: shell, one a start
    of the ranks. lost: n9 answers no more. up: what sinfo says. measure: shell that measures nodes. unpack: shell that
    does so with a bundle on all nodes."""
    (folder / "unpack").write_text(unpack)
    (folder / "measure").write_text(measure)
    (folder / "starts").write_text("0")
    for i, text in enumerate(starts, 1):
        (folder / f"start-{i}").write_text(text)
    for name, body in (
        ("srun", f'case "$*" in *stage-bundle*) . ./unpack; exit ;; *"n9 true") exit {int(lost)} ;; '
                 '*" true"|*"bash -c"*) exit 0 ;; esac\n'
                 "n=$(($(cat starts) + 1)); echo $n >starts; . ./start-$n"),
        ("python", 'case "$*" in *" own "*) echo me ;; *" suspects "*) cat suspects 2>/dev/null ;;'
                   ' *" slow-nodes "*) echo "$HPC_LBSGD_SRUN" >measured; . ./measure ;; esac'),
        ("squeue", "echo RUNNING"),
        ("scontrol", '[ "$2" != hostnames ] || echo "$3" | tr , "\\n"'),
        ("sinfo", f"printf '{up}'"),
    ):  # fmt: skip
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>asked\n{body}\n')
        (folder / name).chmod(0o755)
    job = Job("train", "x", nodes_here, [], "", **keys)
    disk = {"bundle": str(folder / "e.tar"), "stage_dir": "/disk"} if unpack else {}
    site = sites.Site(ranks_per_node=2, preflight_nodes=bool(measure), **disk)
    (folder / "job.sbatch").write_text(render(job, site, str(folder / "python")))
    slurm = {**JOB, "SLURM_JOB_NODELIST": "n1,n2,n9,n4", "SLURM_NTASKS": "8", "SLURM_JOB_PARTITION": "p",
             "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    found = subprocess.run(
        ["bash", "job.sbatch", "r.yaml", "--run=run"], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    asked = (folder / "asked").read_text().splitlines()
    return found.stderr, [line for line in asked if " train " in line], asked


DONE = 'printf \'{\n "status": "done"\n}\n\' >run/status.json'
STOPPED = DONE.replace("done", "stopped")
HUNG = 'printf \'{\n "status": "failed",\n "crashed": true\n}\n\' >run/status.json; echo n2 >suspects; exit 1'
EXPLAINED = 'printf \'{\n "status": "failed"\n}\n\' >run/status.json; echo n2 >suspects; exit 1'


def test_ranks_start_again_on_the_nodes_that_are_left(tmp_path):
    said, starts, asked = elastic(tmp_path, "exit 137", DONE, least=3)
    assert "lost n9; goes on with 3 nodes" in said and "done: run" in said
    assert "--nodelist=n1,n2,n9,n4 --nodes=4 --ntasks=8 " in starts[0]
    assert "--nodelist=n1,n2,n4 --nodes=3 --ntasks=6 " in starts[1]
    assert "scontrol requeue 9" not in asked


@pytest.mark.parametrize("lost", [True, False])
def test_a_refusal_counts_where_all_nodes_answer(lost, tmp_path):
    """mpirun refuses to start anything where a node is gone."""
    said, starts, asked = elastic(tmp_path, "exit 2", DONE, least=3, lost=lost)
    assert len(starts) == 1 + lost and ("lost n9; goes on with 3 nodes" in said) is lost
    assert lost or "failed with 2, not queued again" in said


def test_with_too_few_nodes_left_the_job_is_queued_again_without_the_lost(tmp_path):
    said, starts, asked = elastic(tmp_path, "exit 137", least=4)
    assert "lost n9; queued again without n9" in said and len(starts) == 1
    assert "scontrol update JobId=9 ExcNodeList=n9" in asked


@pytest.mark.parametrize("spare, kept", [("n5 idle", True), ("n5 down*", False)])
def test_a_node_is_not_left_out_where_the_partition_has_too_few_without_it(spare, kept, tmp_path):
    """n9 comes back, perhaps; without it the job would wait for ever."""
    nodes = "\n".join(["n1 alloc", "n2 mix", "n4 comp", "n9 down*", spare]) + "\n"
    said, _, asked = elastic(tmp_path, "exit 137", up=nodes.replace("\n", "\\n"))
    assert ("scontrol update JobId=9 ExcNodeList=n9" in asked) is kept
    assert said.rstrip().endswith("queued again without n9" if kept else "lost n9; queued again")


def test_a_spare_node_takes_the_place_of_one_that_hung(tmp_path):
    said, starts, asked = elastic(tmp_path, HUNG, DONE, nodes_here=2, least=2, spare=2)
    assert "--nodelist=n1,n2 " in starts[0] and "--nodelist=n1,n4 " in starts[1], starts
    assert "lost n2,n9; goes on with 2 nodes" in said  # the other spare was no help


@pytest.mark.parametrize("spare, ends", [(1, "goes on with 3 nodes"), (0, "queued again without n2")])
def test_a_slow_node_is_left_out_at_the_next_stop(spare, ends, tmp_path):
    said, starts, _ = elastic(tmp_path, f"{STOPPED}; echo n2 >suspects", DONE, nodes_here=4 - spare, spare=spare)
    assert f"stopped at a safe point, n2 slow; {ends}" in said and len(starts) == 1 + spare


@pytest.mark.parametrize(
    "measure, keys, ends, started",
    [
        ("echo n2", {"nodes_here": 3, "spare": 1}, "n2; goes on with 3 nodes", "--nodelist=n1,n9,n4 "),
        ("echo n2", {"least": 2}, "n2; goes on with 3 nodes", "--nodelist=n1,n9,n4 "),
        ("echo n2", {}, "bad before the first step: n2; queued again without n2", None),
        ("exit 1", {"least": 2, "lost": True}, "n9; goes on with 3 nodes", "--nodelist=n1,n2,n4 "),  # it says nothing
        ("true", {}, "done: run", "--nodelist=n1,n2,n9,n4 "),
        ("echo n2", {"restarts": 4}, "done: run", "--nodelist=n1,n2,n9,n4 "),  # not for ever
    ],
)
def test_nodes_are_measured_before_the_first_step(measure, keys, ends, started, tmp_path):
    said, starts, asked = elastic(tmp_path, DONE, measure=measure, **{"lost": False, **keys})
    assert ends in said and [started in line for line in starts] == [True] * bool(started), said
    if not keys.get("restarts"):
        line = (tmp_path / "measured").read_text()
        assert "--nodelist=n1,n2,n9,n4 --nodes=4 --ntasks=8 --ntasks-per-node=2 " in line
    if not started:
        assert "scontrol update JobId=9 ExcNodeList=n2" in asked


def test_a_stop_that_finds_no_ranks_is_not_forgotten(tmp_path):
    """They would be started, and nobody would ask them."""
    said, starts, asked = elastic(tmp_path, DONE, measure="kill -USR2 $(ps -o ppid= $PPID)", lost=False)
    assert "asked to stop" in said and "stopped before the first step; queued again" in said and not starts, said
    assert "scontrol requeue 9" in asked


UNPACKED = "for n in n1 n2 n4; do echo $n.cluster.org unpacked '/disk/my env/bin/python'; done"
ANEW = "[ -e once ] || { touch once; echo n9 there '/disk/old env/bin/python'; }; " + UNPACKED  # while they unpack it
ANEW += "; [ -s once ] && echo n9 unpacked '/disk/my env/bin/python'; echo 1 >once"
ALL = f"{UNPACKED}; echo n9 there '/disk/my env/bin/python'"


@pytest.mark.parametrize(
    "unpack, keys, ends, started",
    [
        (ALL, {}, "done: run", "--nodelist=n1,n2,n9,n4 "),
        (f"{UNPACKED}; exit 1", {"least": 3}, "n9; goes on with 3 nodes", "--nodelist=n1,n2,n4 "),
        (f"{UNPACKED}; exit 1", {"nodes_here": 3, "spare": 1}, "n9; goes on with 3 nodes", "--nodelist=n1,n2,n4 "),
        (f"{UNPACKED}; exit 1", {}, "e.tar: n9; queued again without n9", None),
        (f"{UNPACKED}; exit 1", {"restarts": 4}, "e.tar: n9; queued again without n9", None),
        ("echo n9: no room >&2; exit 1", {}, "e.tar; the cause is above", None),
        ("exit 1", {"lost": True}, "e.tar: n9; queued again without n9", None),  # srun starts nothing then
        (ALL.replace("n9 there '/disk", "n9 there '/disc"), {}, "not the same folder on all nodes", None),
        (ANEW, {}, "done: run", "--nodelist=n1,n2,n9,n4 "),
    ],
)
def test_ranks_start_from_the_bundle_where_it_was_unpacked(unpack, keys, ends, started, tmp_path):
    said, starts, asked = elastic(tmp_path, DONE, unpack=unpack, **{"lost": False, **keys})
    assert ends in said and [started in line for line in starts] == [True] * bool(started), said
    assert all(" /disk/my env/bin/python -m hpc_lbsgd.cli train " in line for line in starts), starts
    line, *again = (line for line in asked if "stage-bundle" in line)
    assert again == [line] * (unpack == ANEW or "not the same" in ends)
    assert " --nodes=4 --ntasks=4 --ntasks-per-node=1 " in line and line.endswith(f"stage-bundle {tmp_path}/e.tar")
    assert any(" --release " in line for line in asked) is ("queued again" not in ends)


def test_nodes_that_cannot_unpack_end_the_job_after_some_restarts(tmp_path):
    """Else a bundle that fits on no node's disk would have it queued again for ever."""
    for restarts in range(5):
        said, _, _ = elastic(tmp_path, unpack=f"{UNPACKED}; exit 1", restarts=restarts, lost=False)
    assert "gave up after 3 restarts without a new checkpoint" in said


def test_a_failure_that_a_rank_explains_is_the_end_also_where_a_node_was_slow(tmp_path):
    said, starts, _ = elastic(tmp_path, EXPLAINED, least=2, lost=False)
    assert "failed with 1, not queued again" in said and len(starts) == 1


def test_a_controller_that_is_away_is_asked_again_and_of_an_array_about_this_task_alone(tmp_path):
    code, said, asked = run_script(tmp_path, "stopped", **ARRAY)
    assert code == 0 and "does not answer; asking again" in said, said
    assert said.count("queued again") == 1 and said.rstrip().endswith("stopped at a safe point; queued again")
    assert "scontrol requeue 7_1\n" in asked and "squeue --noheader --jobs=7_1 " in asked and "9" not in asked


@pytest.mark.parametrize("code, queued", [(255, False), (137, True)])  # a wrong option of srun; a killed rank
def test_a_wrong_option_of_srun_is_no_crash(tmp_path, code, queued):
    _, said, asked = run_script(tmp_path, code=code)
    assert ("scontrol requeue 9\n" in asked) is queued, said


def test_in_a_container_of_pyxis_python_is_looked_for_inside(tmp_path):
    text = "{container: {runtime: pyxis, image: x.sqsh}, python: /in/the/image/python}"
    code, said, asked = run_script(tmp_path, "done", text=text)
    assert code == 0 and "--container-image=x.sqsh /in/the/image/python" in asked, said


def test_a_task_of_an_array_has_its_value_and_its_run(tmp_path):
    job = {"array_key": "optim.base_lr", "array_values": ["0.1", "0.2"]}
    code, said, asked = run_script(tmp_path, "done", run="-x", result="'-x/optim.base_lr=0.2'", job=job, **ARRAY)
    assert code == 0 and "--set optim.base_lr=0.2 --run ./-x/optim.base_lr=0.2 --resume-if-exists" in asked, said


def test_a_run_folder_may_begin_with_a_dash(tmp_path):
    _, said, asked = run_script(tmp_path, run="-x")
    assert "--run ./-x " in asked and (tmp_path / "-x").is_dir(), said


@pytest.mark.parametrize("text", ["gpus_per_node: a100:4", "srun_mpi: cray_shasta", "srun_mpi: pmix_v4",
                                  "options: [--array=0-3%2]", "{launcher: mpirun, host_suffix: _ib}"])  # fmt: skip
def test_what_sites_have_is_accepted(text):
    assert sites.Site.model_validate(yaml12.mapping(text, "site"))


def test_cores_a_rank_follow_from_the_node_and_modules_are_found_in_a_plain_shell():
    text = "{gpus_per_node: 'a100:4', cores_per_node: 66, modules: [gcc], environment: {A: b, C: d}}"
    script = render(Job("train", "x", 1, [], ""), sites.Site.model_validate(yaml12.mapping(text, "site")), "python")
    lines = script.splitlines()
    assert {"#SBATCH --gpus-per-node=a100:4", "#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=16"} < set(lines)
    assert lines.index("module load gcc") > next(i for i, line in enumerate(lines) if "/etc/profile" in line)
    assert {"export HPC_LBSGD_EXPORT=A,C"} < set(lines) and "export SLURM_EXPORT_ENV=ALL" in script
