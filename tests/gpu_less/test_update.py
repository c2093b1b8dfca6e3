"""The update as GPUs take it, by torch's fused kernel, which torch has for CPUs too."""

from dataclasses import replace

import pytest
import torch
from test_graphs import Alone

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.train import optim


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_fused_update_is_ours(nesterov):
    """With and without decay and momentum, over views that begin in the middle of a bucket."""
    schedule = recipes.Recipe.model_validate({"batch": {"samples_per_worker": 8, "workers": 2}}).build_schedule(64)
    found = []
    for fused in (False, True):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(50, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 7))
        layouts = plan_layouts(model.named_parameters(), optim.no_decay_names(model), 64, 3000, 1000)
        buckets = Buckets(layouts, Alone(), torch.device("cpu"), torch.float32)
        assert len(buckets.buckets) > 1
        update = optim.Sgd(buckets, recipes.Optim(weight_decay=0.01, nesterov=nesterov))
        assert not update.fused
        update.fused = fused
        for number, momentum in enumerate((0.9, 0.9, 0.0, 0.5)):
            for bucket in buckets.buckets:
                bucket.gradients.normal_()
            update.step(replace(schedule.at(number), momentum=momentum, lr=0.1 / (number + 1)), 0.0)
        found.append([*(b.weights for b in buckets.buckets), *update.flats["momentum"]])
    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, own, rtol=1e-6, atol=1e-7)
