"""Preflight's comparison of a model as its author wrote it with the model that trains."""

import copy

import torch

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.train import preflight, probe
from hpc_lbsgd.train.losses import loss_function
from hpc_lbsgd.train.replica import outputs

CPU = torch.device("cpu")
RECIPE = recipes.validate({"seed": 3, "batch": {"samples_per_worker": 8, "workers": 4}})


def checks_of(make, size=12, channels=3, samples=4):
    """({check: None or what is wrong}, what was seen) of a model on random pictures."""
    torch.manual_seed(0)
    model = make()

    def build():  # to draw the same weights again, a dozen times, takes longer than the checks
        torch.manual_seed(0)
        return copy.deepcopy(model)

    generator = torch.Generator().manual_seed(1)
    call = probe.Call(
        torch.randn(samples, channels, size, size, generator=generator),
        torch.randint(0, 10, (samples,), generator=generator),
        loss_function(recipes.Train()),
        lambda model, images: outputs(model, images, torch.float32, CPU, False),
        7,
    )
    seen = probe.look(build(), call)
    found = preflight.compare(RECIPE, build, call, seen, torch.float32, CPU)
    return {c.check: None if c.ok else c.what for c in found}, seen
