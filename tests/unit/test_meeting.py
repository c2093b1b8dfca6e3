"""Where ranks without MPI meet: from the environment alone."""

import os
import socket
import subprocess
import sys

import pytest

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import meeting, spawn
from hpc_lbsgd.parallel.world import from_environment, launcher

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[07-08]"}  # fmt: skip
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
OWN = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    "nodes, first",
    [("n1", "n1"), ("n[003-010,12],login", "n003"), ("a,b[1-2]", "a"), ("rack[1-2]n[3,5]-ib", "rack1n3-ib")],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert meeting.first_host(nodes) == first


@pytest.mark.parametrize(
    "env, starter, place",
    [
        ({}, None, None),
        (TORCHRUN | OWN, "torchrun", ("a", 1)),
        (OPENMPI, "mpirun", None),  # MPI tells
        (OPENMPI | OWN, "mpirun", ("a", 1)),
        (SRUN, "srun", ("n07", 16309)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4"}, "srun", ("127.0.0.1", 16309)),
        (SRUN | OWN, "srun", ("a", 1)),
        (SRUN | OPENMPI, "mpirun", None),  # mpirun's daemons are a step of Slurm's
        (SRUN | OPENMPI | TORCHRUN | OWN, "torchrun", ("a", 1)),  # torchrun on each node
        ({"RANK": "1", "WORLD_SIZE": "2"}, None, None),  # left over from something else
        (OPENMPI | ALONE | AGENT | OWN, "mpirun", None),  # mpirun inside of torchrun's only rank: its store is not ours
        (SRUN | ALONE | AGENT | OWN, "srun", ("n07", 16309)),
        (TORCHRUN | AGENT | OWN, "torchrun", ("a", 1)),
        (OPENMPI | {"MASTER_ADDR": "a", "MASTER_PORT": ""}, "mpirun", None),  # export MASTER_PORT=$UNSET
    ],
)
def test_who_started_the_ranks_and_where_they_meet(env, starter, place):
    assert launcher(env) == starter
    assert meeting.told(from_environment(env), env) == place


def test_jobs_and_steps_meet_at_ports_of_their_own():
    world = from_environment(SRUN)
    steps = [SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (77, 78, 79) for step in range(9)]
    ports = {meeting.told(world, env)[1] for env in steps}
    assert len(ports) == len(steps) and all(1024 < port < 32_768 for port in ports)


@pytest.mark.parametrize(
    "program, code",
    [
        ("pass", 0),
        ("sys.exit(2)", 2),
        ("time.sleep(60) if rank else sys.exit(3)", 3),
        ("time.sleep(60) if rank else os.kill(os.getpid(), 9)", 137),
        ("signal.signal(15, signal.SIG_IGN); time.sleep(2) if rank else sys.exit(3)", 3),
    ],
)
def test_spawned_ranks_end_together_with_the_first_ones_code(program, code):
    text = f"import os, signal, sys, time; rank = int(os.environ['RANK']); {program}"
    line = [sys.executable, "-m", "hpc_lbsgd.parallel.spawn", "2", sys.executable, "-c", text]
    done = subprocess.run(line, timeout=30, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("rank 0 was ended by SIGKILL" in done.stderr) == (code == 137)


@pytest.mark.parametrize("port", ["none", "0", "65536", "-1", "2\u00b2"])
def test_a_port_that_is_none_is_refused(port):
    env = OPENMPI | {"MASTER_ADDR": "a", "MASTER_PORT": port}
    with pytest.raises(RequestError, match="MASTER_PORT = "):
        meeting.told(from_environment(env), env)


def test_ranks_do_not_outlive_the_process_that_spawned_them():
    text = "import os, time; os.write(1, b'here\\n'); time.sleep(9); os.write(1, b'left over')"
    line = [sys.executable, "-m", "hpc_lbsgd.parallel.spawn", "2", sys.executable, "-c", text]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as spawned:
        assert [spawned.stdout.readline() for _ in range(2)] == ["here\n"] * 2
        spawned.kill()
        assert spawned.stdout.read() == ""  # its end: no rank holds it open


def test_what_spawned_ranks_are_told():
    stale = ALONE | AGENT | OWN | {"GROUP_RANK": "3"}
    told = [stale | env for env in spawn.environments(2, 7)]
    assert [from_environment(env) for env in told] == [(0, 2, 0, 2, 0), (1, 2, 1, 2, 0)]
    assert not any(meeting.has_agent(env) for env in told)


def test_ranks_that_do_not_come_are_named():
    code = (
        "from hpc_lbsgd.parallel import meeting, world; meeting.MEET_S = 1.0\n"
        "from hpc_lbsgd.errors import RunError\n"
        "try: meeting.meet(world.from_environment())\nexcept RunError as problem: print(problem)"
    )
    env = os.environ | spawn.environments(3, meeting.free_port())[0]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ranks [1, 2] of 3 did not come within 1 s\n", done.stdout + done.stderr


def nobody_listens_at(port):
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) != 0


def test_a_users_own_port_is_for_ranks_of_several_numbers():
    """As those of a heterogeneous job of Slurm's have."""
    assert meeting.start_of(SRUN) == "77.0" and meeting.start_of(SRUN | OWN) == meeting.start_of(TORCHRUN | OWN) == ""


def test_a_rank_that_comes_to_another_jobs_store_meets_nobody_there():
    """Two jobs on a shared node, a thousand numbers apart, have one port."""
    code = (
        "import torch.distributed\n"
        "from hpc_lbsgd.errors import RunError\n"
        "from hpc_lbsgd.parallel import meeting, world\n"
        "print('here', flush=True)\n"
        "meeting.MEET_S = float(input())\n"
        "try: print(meeting.meet(world.from_environment()), flush=True)\n"
        "except RunError as problem: print(problem, flush=True)"
    )
    step = next(str(i) for i in range(99) if nobody_listens_at(meeting.PORTS[17 * 77 + i]))
    of_two = os.environ | SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_ID": step}
    assert len({meeting.told(from_environment(of_two), of_two | {"SLURM_JOB_ID": job}) for job in ("77", "1077")}) == 1
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    line = [sys.executable, "-c", code]
    jobs = [{"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {"SLURM_PROCID": "1", "SLURM_JOB_ID": "1077"}]
    ranks = [subprocess.Popen(line, env=of_two | job, **pipes) for job in jobs]
    assert [rank.stdout.readline() for rank in ranks] == ["here\n"] * 2
    for rank, limit in zip(ranks, (12, 6), strict=True):  # rank 0 has the store, and stays longer
        rank.stdin.write(f"{limit}\n")
        rank.stdin.flush()
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert said == ["ranks [1] of 2 did not come within 12 s\n", "ranks [0] of 2 did not come within 6 s\n"]
