"""What an engine of several ranks is handed at the start: contiguous tensors of types that it knows, nothing else."""

from types import SimpleNamespace

import torch
from torch import nn

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.train import models
from hpc_lbsgd.train.replica import Replica

HOROVODS = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.bool)


class Strict:
    """One of two ranks, with the demands of Horovod's broadcast; the other has the same weights."""

    name, rank, size, local_rank, local_size, sums_gradients, named_sums = "strict", 0, 2, 0, 2, False, True

    def __init__(self):
        self.seen = []

    def wrap(self, model, bucket_mb):
        return model

    def broadcast(self, tensor, name):
        assert tensor.is_contiguous() and tensor.dtype in HOROVODS, name
        self.seen.append(name)

    def gather(self, value):
        return [value] * self.size


def test_frozen_channels_last_convolutions_are_broadcast_in_order(monkeypatch):
    """They lie in no bucket: a fine-tuned backbone, say."""

    def make(section, channels, classes):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
        model[0].weight.requires_grad_(False)
        model.register_buffer("table", torch.ones(3, 4, 2, 2, dtype=torch.bfloat16))
        return model

    monkeypatch.setitem(models.MODELS, "frozen", make)
    section = SimpleNamespace(**{**recipes.Model().model_dump(), "name": "frozen"})
    recipe = recipes.Recipe.model_validate({"batch": {"samples_per_worker": 8, "workers": 2}})
    recipe = recipe.model_copy(update={"model": section})
    engine = Strict()
    replica = Replica(recipe, 4, engine, torch.device("cpu"))
    weight = replica.model[0].weight
    assert not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    before = weight.clone()
    replica.synchronise()
    assert {"state.0.weight", "state.table"} <= set(engine.seen)
    assert torch.equal(weight, before) and weight.is_contiguous(memory_format=torch.channels_last)
