"""`plan` as a job estimate: what more nodes do to the same recipe."""

import pytest

from hpc_lbsgd import plan, plan_show
from hpc_lbsgd.recipe import read


def test_kn_follows_the_nodes_with_per_rank_workers():
    """Goyal et al. 2017, table 1: 256 GPUs, kn = 8192, learning rate 3.2."""
    found = plan.jobs(read("goyal-resnet50"), 1281167, 8, rate=1000.0)
    assert [j["nodes"] for j in found] == [1, 2, 4, 8, 16, 32]
    last = found[-1]
    assert (last["global_batch"], last["ranks"], last["steps"]) == (8192, 256, 14040)
    assert last["peak_lr"] == pytest.approx(3.2) and last["warmup_steps"] == 5 * 156
    # 32 images a step at 1000 images/s
    assert last["hours"] == pytest.approx(14040 * 0.032 / 3600)
    assert last["node_hours"] == pytest.approx(32 * last["hours"])


def test_a_fixed_k_stays_and_ranks_without_work_are_said():
    recipe = read("goyal-resnet50", ["batch.workers=24"])
    found = plan.jobs(recipe, 1281167, 8, rate=1000.0)
    assert {j["global_batch"] for j in found} == {24 * 32}
    assert len({j["steps"] for j in found}) == 1
    step_s = [j["hours"] * 3600 / j["steps"] for j in found]
    # 24 workers on 8, 16, 32 ranks: 3, 2, 1 passes for the busiest
    assert step_s == pytest.approx([0.096, 0.064, 0.032, 0.032, 0.032, 0.032])
    assert [j["idle_ranks"] for j in found] == [0, 0, 8, 40, 104, 232]


def test_a_growing_batch_takes_the_time_of_each_stage():
    settings = ["batch.workers=8", "batch.samples_per_worker=10", "batch.last_batch=drop", "train.epochs=2"]
    settings += [
        "schedule.kind=increasing-batch",
        "schedule.milestones=[1]",
        "schedule.factor=2",
        "schedule.warmup=none",
    ]
    one = plan.jobs(read("goyal-resnet50", settings), 160, 8, rate=10.0)[0]
    # two steps of one pass, then one step of two passes, a second each
    assert one["steps"] == 3 and one["hours"] * 3600 == pytest.approx(2 * 1 + 1 * 2)
    capped = plan.jobs(read("goyal-resnet50", [*settings, "train.max_steps=2"]), 160, 8, rate=10.0)[0]
    assert capped["hours"] * 3600 == pytest.approx(2)


def test_a_number_of_nodes_that_the_data_cannot_feed_says_so():
    found = plan.jobs(read("goyal-resnet50", ["batch.last_batch=drop"]), 1000, 8, rate=1000.0)
    assert "problem" not in found[0] and "more than the 1000 samples" in found[-1]["problem"]


def test_a_plan_says_what_it_takes_for_granted():
    """On a laptop `plan fashion-mnist` spoke of 8 GPUs and of hours 0.00, and of no flag that would mend it."""
    made = read("fashion-mnist")
    assumed, given = (plan_show.show("fashion-mnist", made, plan.plan(made, 1, 2, rate)) for rate in (None, 900.0))
    assert "(assumed: an A100's; --images-per-s says yours)" in assumed and "--gpus-per-node" in assumed
    assert "A100" not in given
