"""Launchers' environments, command lines, and what the display says."""

import io

import pytest

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel.horovod_engine import defaults, environment
from hpc_lbsgd.parallel.world import World, from_environment
from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup
from hpc_lbsgd.train.display import Display


@pytest.mark.parametrize(
    "env, world",
    [
        ({}, World(0, 1, 0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, World(9, 16, 1, 8)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, World(3, 4, 1, 2)),
        ({"SLURM_PROCID": "255", "SLURM_STEP_NUM_TASKS": "256", "SLURM_LOCALID": "7",
          "SLURM_STEP_TASKS_PER_NODE": "8(x32)"}, World(255, 256, 7, 8)),
        # srun --mpi=pmi2: Slurm sets two of MPICH's four
        ({"PMI_RANK": "9", "PMI_SIZE": "11", "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1",
          "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, World(9, 11, 1, 3)),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, World(0, 1, 0, 1)),
    ],
)  # fmt: skip
def test_world_before_mpi(env, world):
    assert from_environment(env) == world


def test_engine_settings_follow_the_recipe():
    def settings(*changes):
        recipe = recipes.read("goyal-resnet50", list(changes))
        return environment(recipe.machine, recipe.determinism, True)

    assert settings() == {"HOROVOD_FUSION_THRESHOLD": "0"}
    fused = settings("machine.reduction=fusion", "machine.fusion_threshold_mb=64", "machine.cycle_time_ms=2.5")
    assert fused == {"HOROVOD_FUSION_THRESHOLD": str(64 * 2**20), "HOROVOD_CYCLE_TIME": "2.5"}
    chosen = settings("machine.yield_when_idle=false", "machine.allreduce=torus")
    assert (chosen["OMPI_MCA_mpi_yield_when_idle"], chosen["HOROVOD_TORUS_ALLREDUCE"]) == ("0", "1")
    exact = settings("determinism=same-ranks")
    assert exact["HOROVOD_AUTOTUNE"] == "0" and exact["OMPI_MCA_coll_tuned_allreduce_algorithm"] == "4"
    assert (
        defaults(on_gpu=True) == {"HOROVOD_CYCLE_TIME": "0.25"}
        and defaults(on_gpu=False)["OMPI_MCA_mpi_yield_when_idle"] == "1"
    )


def test_plain_lines_show_progress_and_eta():
    out = io.StringIO()
    display = Display(Schedule(3200, 64, [Stage(0, 1, 0.1, 0.9)], 2, "partial", Warmup(0, 0.1)), 0, None, out)
    display({"kind": "step", "step": 9, "epoch": 0, "loss": 1.25, "lr": 0.1, "global_batch": 64, "samples": 64,
             "step_s": 0.5, "data_wait_s": 0.05})  # fmt: skip
    assert out.getvalue() == ("epoch 1/2  step 10/100  loss 1.2500  lr 0.1  kn 64  128 images/s  data wait 10.0%  "
                              "ETA 0:00:45\n")  # fmt: skip
