"""Settings of engines, and what the display says."""

import io

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel.horovod_engine import defaults, environment
from hpc_lbsgd.theory.schedule import Schedule, Stage, Warmup
from hpc_lbsgd.train.display import Display


def test_engine_settings_follow_the_recipe():
    def settings(*changes):
        recipe = recipes.read("goyal-resnet50", list(changes))
        return environment(recipe.machine, recipe.determinism)

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
