"""A rank finds its place under every launcher, and believes none that only started its launcher."""

import json
import shutil
import subprocess
import sys
from fractions import Fraction

import pytest

from hpc_lbsgd.parallel.world import TABLE, World, from_environment, launcher, shares

SRUN = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
        "SLURM_NODEID": "2"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_RANK": "9"}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
PALS = {"PALS_RANKID": "13", "PMI_RANK": "13", "PMI_SIZE": "24", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "12",
        "PALS_NODEID": "1", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "12"}  # fmt: skip
FLUX = {"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2",
        "PMI_RANK": "5", "PMI_SIZE": "8"}  # fmt: skip
JSRUN = {"JSM_NAMESPACE_RANK": "7", "JSM_NAMESPACE_SIZE": "12", "JSM_NAMESPACE_LOCAL_RANK": "1",
         "JSM_NAMESPACE_LOCAL_SIZE": "6", "PMIX_RANK": "7"}  # fmt: skip
APRUN = {"ALPS_APP_PE": "9", "HPC_LBSGD_RANKS": "16", "HPC_LBSGD_RANKS_PER_NODE": "8"}
MVAPICH2 = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1",
            "MV2_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
CRAY = {"PMI_RANK": "9", "PMI_SIZE": "16", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "8"}

PLACES = [
    (TORCHRUN, "torchrun", World(5, 8, 1, 4, 1)),
    (OPEN_MPI, "mpirun", World(9, 16, 1, 8)),
    (MVAPICH2, "mpirun_rsh", World(3, 4, 1, 2)),
    (HYDRA, "mpiexec", World(3, 4, 1, 2)),
    (JSRUN, "jsrun", World(7, 12, 1, 6)),
    (PALS, "mpiexec of PALS", World(13, 24, 1, 12, 1)),
    (APRUN, "aprun", World(9, 16, 1, 8)),
    (FLUX, "flux run", World(5, 8, 1, 4)),
    (SRUN, "srun", World(9, 11, 1, 3, 2)),
    (SRUN | {"PMIX_RANK": "9"}, "srun", World(9, 11, 1, 3, 2)),
    (SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"}, "srun", World(9, 11, 1, 3, 2)),  # --mpi=pmi2
    (CRAY, "PMI", World(9, 16, 1, 8)),
    ({}, None, World(0, 1, 0, 1)),
]


@pytest.mark.parametrize("env, name, world", PLACES, ids=lambda value: value if isinstance(value, str) else "")
def test_each_launchers_ranks_find_their_place(env, name, world):
    assert (launcher(env), from_environment(env)) == (name, world)


def test_every_line_of_the_table_is_tried():
    assert {name for _, name, _ in PLACES if name} == {line.launcher for line in TABLE}


BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SHELL = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
                "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
DAEMON = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
                 "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}  # fmt: skip
SINGLETON = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
             "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}  # fmt: skip


@pytest.mark.parametrize(
    "outer, inner",
    [
        (BATCH, OPEN_MPI),
        (SHELL, OPEN_MPI),
        (DAEMON, OPEN_MPI),  # the variables of Slurm's step that started mpirun's daemon on this node
        (DAEMON, HYDRA),
        (DAEMON, MVAPICH2),
        (FLUX, OPEN_MPI),
        (OPEN_MPI, TORCHRUN),
        (DAEMON, TORCHRUN),
        (SINGLETON, SRUN),
        (SINGLETON, TORCHRUN),
        (SINGLETON, FLUX),
        ({"RANK": "0", "WORLD_SIZE": "2"}, OPEN_MPI),  # a cloud's variables, of machines
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, OPEN_MPI),  # left in a shell
        ({"PMI_SIZE": "4", "PMI_RANK": "7"}, SRUN),
        (BATCH, {}),
        (SHELL, {}),
    ],
)
def test_what_an_outer_launcher_left_is_not_believed(outer, inner):
    assert from_environment(outer | inner)[:4] == from_environment(inner)[:4]


@pytest.mark.parametrize("env", [{"OMPI_COMM_WORLD_RANK": "a", "OMPI_COMM_WORLD_SIZE": "2"},
                                 {"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "2", "FLUX_JOB_NNODES": "0"},
                                 {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "4"}])  # fmt: skip
def test_numbers_that_do_not_fit_together_are_nobodys(env):
    assert from_environment(env) == World(0, 1, 0, 1)


A, B = ("a", [0, 1, 2, 3]), ("b", [0, 1, 2, 3])


@pytest.mark.parametrize(
    "places, expected",
    [
        ([A], [4]),
        ([A, B], [4, 4]),  # the same numbers on another host
        ([("a", [0, 1]), ("a", [2, 3])], [2, 2]),  # bound by the launcher
        ([A] * 2, [2, 2]),  # shown what the job has: mpirun --bind-to none in a cgroup of four cores
        ([A] * 6 + [B], [Fraction(2, 3)] * 6 + [4]),
        ([A, ("a", [3])], [Fraction(7, 2), Fraction(1, 2)]),
        ([("a", list(range(12)))] * 6, [2] * 6),
    ],
)
def test_cores_of_a_rank_are_those_it_shares_with_none(places, expected):
    assert shares(places) == expected


def test_under_a_real_hydra_two_ranks_find_their_places(tmp_path):
    hydra = shutil.which("mpiexec.hydra")
    if not hydra:
        pytest.skip("not installed: mpich")
    code = "import json, os; from hpc_lbsgd.parallel.world import *; "  # a file each: what ranks print, Hydra mixes
    code += "open(str(os.getpid()), 'w').write(json.dumps([launcher(), from_environment()]))"
    line = [hydra, "-n", "2", sys.executable, "-c", code]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    found = sorted(json.loads(path.read_text()) for path in tmp_path.iterdir())
    assert found == [["mpiexec", [0, 2, 0, 2, None]], ["mpiexec", [1, 2, 1, 2, None]]], result.stderr
