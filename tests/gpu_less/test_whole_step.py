"""A whole training step of ResNet-50 on torch's `meta` device: what the host waits for, what travels between devices,
and how much is launched. A graph for a GPU is made of the same operations."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import gpu_model


@pytest.mark.parametrize("determinism", ["off", "any-ranks"])
@pytest.mark.parametrize("batch", [32, 256])
def test_the_host_reads_once_a_step_and_nothing_else_leaves_the_device(determinism, batch):
    seen = gpu_model.count(gpu_model.resnet50(batch, determinism=determinism, precision="bf16"))
    assert seen.reads == ["aten::_to_copy"]  # the control vector, with what the step was worth
    assert seen.copies == []
    # and by then the device has the next step's backward to do
    assert seen.at["summed"] < seen.at["updated"] < 200 < seen.at["read"] == seen.launches
    # 8 groups of BatchNorm in a batch of 256. Ceilings: what it was counted at, and a little
    assert seen.launches < {32: 950, 256: 2950}[batch], seen.launches


def test_steps_that_look_closer_read_once_too():
    """Step 0 counts what fixed point makes zero, and measures the noise scale. It is read before its update."""
    recipe = gpu_model.resnet50(32, workers=2, determinism="any-ranks", precision="bf16")
    seen = gpu_model.count(recipe, number=0)
    assert seen.reads == ["aten::_to_copy"] and seen.copies == []
    assert seen.at["summed"] < seen.at["read"] < seen.at["updated"]


OURS = [{"optim__name": "lars"}, {"optim__name": "adam"}, {"optim__form": "v"}, {"train__ema_decay": 0.99}]


@pytest.mark.parametrize("more", OURS, ids=str)
def test_no_update_of_ours_makes_the_host_wait(more):
    seen = gpu_model.count(gpu_model.resnet50(32, **more))
    assert seen.reads == ["aten::_to_copy"] and seen.at["read"] == seen.launches


def test_a_read_or_a_copy_that_is_not_meant_is_seen():
    with gpu_model.Seen() as seen:
        x = torch.ones(4, 4, device="meta")
        if (x.sum() > 0).item():
            x + torch.ones(4, 4).to("meta")
    assert seen.reads == ["aten::_local_scalar_dense"] and seen.copies == ["aten::_to_copy"]
