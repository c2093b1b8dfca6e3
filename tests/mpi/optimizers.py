"""Under mpirun, or alone: every optimizer of torch.optim trains a small model over a tail of one sample; rank 0 prints
{name: digest of its weights, or why it is refused}. Before the last step another replica is filled from a checkpoint on
rank 0, and must end alike.

    optimizers.py FOLDER BUCKET_MB
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.parallel import world as worlds
from hpc_lbsgd.parallel.agree import agree
from hpc_lbsgd.recipe import Machine, Recipe
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.train import checkpoint
from hpc_lbsgd.train.replica import Replica, weights_sha256
from hpc_lbsgd.train.step import Stepper

CPU, SAMPLES = torch.device("cpu"), 49  # three workers of 8: two full steps, and one of a single sample


class Mixed(torch.optim.Optimizer):
    """A user's: signs for matrices, kept in its groups how often; other state in a list."""

    def __init__(self, groups, lr, momentum, weight_decay=0.0, gain=1.0):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "gain": gain, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                kept = self.state[p].setdefault("moments", [torch.zeros_like(p), torch.zeros((), dtype=torch.int64)])
                kept[0].mul_(group["momentum"]).add_(p.grad, alpha=1 / group["k"])
                kept[1] += 1
                update = kept[0].sign() / kept[1] if p.dim() > 1 else kept[0]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * group["gain"])


def layerwise(groups, lr, weight_decay):
    """Named parameters, each layer at a rate of its own."""
    found = [
        {"params": [p], "lr": lr * 0.9 ** int(name.split(".")[0]), "weight_decay": group["weight_decay"]}
        for group in groups
        for name, p in group["params"]
    ]
    return torch.optim.RMSprop(found, lr=lr)


def with_vectors():
    return nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4)
    )


def matrices():
    return nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))


def without_decay(name):
    return {"name": name, "weight_decay": 0.0}


NAMES = sorted(c.__name__ for c in vars(torch.optim).values() if isinstance(c, type) and c is not torch.optim.Optimizer
               and issubclass(c, torch.optim.Optimizer))  # fmt: skip
CASES = {name: ({"name": name}, with_vectors) for name in NAMES}
CASES |= {
    "Rprop without decay": (without_decay("Rprop"), with_vectors),
    "SparseAdam without decay": (without_decay("SparseAdam"), with_vectors),
    "Muon of matrices": ({"name": "Muon"}, matrices),
    "AdamW, foreach": ({"name": "adamw", "options": {"foreach": True, "amsgrad": True}}, with_vectors),
    "AdamW, fused": ({"name": "adamw", "options": {"fused": True}}, with_vectors),
    "torch's SGD": ({"name": "torch.optim:SGD", "options": {"nesterov": True}}, with_vectors),
    "torch's SGD without momentum": ({"name": "torch.optim:SGD", "momentum": 0.0}, with_vectors),
    "own": ({"name": "optimizers:Mixed", "options": {"gain": 0.5}}, with_vectors),
    "own, layer-wise": ({"name": "optimizers:layerwise"}, with_vectors),
}


def batches(requests):
    x = torch.randn(SAMPLES, 12, generator=torch.Generator().manual_seed(1))
    for request in requests:
        chosen = torch.as_tensor(request.samples)
        yield Batch(x[chosen], chosen % 4)


def replica_of(recipe, make, engine):
    torch.manual_seed(0)
    return Replica(recipe, 4, engine, CPU, model=make())


def trained(name, optim, make, engine, folder, bucket_mb):
    recipe = Recipe.model_validate({
        "determinism": "any-ranks",
        "batch": {"samples_per_worker": 8, "workers": 3},
        "optim": {"base_lr": 0.01, "base_batch": 24, **optim},
        "schedule": {"kind": "cosine", "warmup": "none"},
        "train": {"epochs": 2},
        "machine": {"bucket_mb": bucket_mb, "first_bucket_mb": bucket_mb},
    })  # fmt: skip
    schedule = recipe.build_schedule(SAMPLES)
    replica = replica_of(recipe, make, engine)
    replica.synchronise()
    stepper = Stepper(replica, recipe, iter(()))
    run = RunFolder(Path(folder) / name)
    for number in range(5):
        if number == 4:
            if engine.rank == 0:
                run.path.mkdir()
                checkpoint.save(run, replica, checkpoint.State(4, "", ""), 1)
            again = replica_of(recipe, make, engine)
            agree(engine, partial(checkpoint.load, run.checkpoints / checkpoint.name_of(4), again))
            again.synchronise()
            twin = Stepper(again, recipe, batches(stepper.passes.requests(schedule, 0, number, number + 1)))
            assert twin.run(schedule.at(number), schedule.at(number - 1).lr).finite
        stepper.batches = batches(stepper.passes.requests(schedule, 0, number, number + 1))
        stepper._ahead = None
        assert stepper.run(schedule.at(number), schedule.at(number - 1).lr if number else 0.0).finite
    replica.check_equal(name)
    digest = weights_sha256(replica.model)
    assert weights_sha256(again.model) == digest, f"{name}: another step after a resume"
    return digest


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    ranks = worlds.from_environment().size
    machine = Machine(engine="horovod" if ranks > 1 else "torch")
    engine, found = engines.create(machine, "any-ranks", CPU), {}
    for name, (optim, make) in CASES.items():
        try:
            found[name] = trained(name, optim, make, engine, sys.argv[1], float(sys.argv[2]))
        except RequestError as problem:
            found[name] = f"refused: {problem}"
    if engine.rank == 0:
        print(json.dumps(found))
    engine.close()
