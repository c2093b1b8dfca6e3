"""Habits of scripts, by rank, for test_api.py: prints a line a case, from rank 0, of what all ranks have. A file as
argument."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpc_lbsgd as lb
from hpc_lbsgd.train.replica import weights_sha256

N = 67
data = TensorDataset(torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(N) % 4)
schedule = lb.Schedule(samples=N, workers=4, samples_per_worker=4, epochs=1, lr=0.1)
too_early = lb.GlobalShuffle(data, schedule)
world = lb.init()


def of_rank(case: str, name: str) -> int:
    return world.rank if case == name else 0


def train(case: str) -> str:
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(216, 4))
    if case == "another model on a rank" and world.rank:
        model[5] = nn.Linear(216, 5)
    rate = 0.1 * (1 + of_rank(case, "another rate on a rank"))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    if case == "the optimizer's state is rank 0's":
        if world.rank == 0:
            model(torch.ones(4, 1, 8, 8)).sum().backward()
            optimizer.step()
        optimizer.zero_grad()
    groups = optimizer.param_groups
    run = lb.distribute(model, optimizer, seed=of_rank(case, "another seed of a rank's model"))
    assert optimizer.param_groups is groups and groups[0]["lr"] == 0.1
    seed = of_rank(case, "another seed of a rank's shuffle")
    shuffle = too_early if case == "a shuffle made before init" else lb.GlobalShuffle(data, schedule, seed=seed)
    for step in shuffle.steps(DataLoader(data, batch_sampler=shuffle)):
        mirrored = case == "what a script draws between parts" and torch.rand(()) < 0.5
        for part in step.workers:
            images = part.inputs.flip(3) if mirrored else part.inputs
            with run.part(part):
                run.backward(nn.functional.cross_entropy(model(images), part.labels, reduction="none"))
        if run.reduce(step):
            groups[0]["lr"] = 0.1 / (1 + of_rank(case, "a rate that one rank sets later"))
            optimizer.step()
    if case == "a file under another schedule":
        lb.save(sys.argv[1], run)
        longer = lb.Schedule(samples=N, workers=4, samples_per_worker=4, epochs=2, lr=0.1)
        shuffle = lb.GlobalShuffle(data, longer, start=lb.load(sys.argv[1], run))
        run.reduce(next(shuffle.steps(DataLoader(data, batch_sampler=shuffle))))
    return weights_sha256(model)


CASES = (
    "nothing", "another rate on a rank", "the optimizer's state is rank 0's", "what a script draws between parts",
    "a file under another schedule", "another model on a rank", "another seed of a rank's model",
    "another seed of a rank's shuffle", "a shuffle made before init", "a rate that one rank sets later",
)  # fmt: skip
for case in CASES:
    try:
        found = train(case)
    except (lb.RequestError, lb.RunError) as problem:
        found = f"refused: {problem}"
    everywhere = world.engine.gather(found)
    if world.rank == 0:
        print(f"{case}: {found if len(set(everywhere)) == 1 else everywhere}", flush=True)
