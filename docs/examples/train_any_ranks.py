"""Train a model of one's own on any number of ranks, to the same bits:

    python docs/examples/train_any_ranks.py
    mpirun -np 3 --oversubscribe python docs/examples/train_any_ranks.py
    torchrun --nproc-per-node 2 docs/examples/train_any_ranks.py

A folder as argument: the run's state is kept there, and a second start goes on from it.
"""

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import hpc_lbsgd as lb


class Pictures(Dataset):
    """900 of 10 classes, with noise that is drawn anew each time."""

    def __len__(self):
        return 900

    def __getitem__(self, index):
        return torch.full((3, 8, 8), index % 10 / 4) + torch.randn(3, 8, 8), index % 10


world = lb.init()
state = Path(sys.argv[1]) / "state.pt" if len(sys.argv) > 1 else None

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 36, 10)
).to(world.device)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
criterion = nn.CrossEntropyLoss(reduction="none")
data = lb.Keyed(Pictures(), seed=0)

schedule = lb.Schedule(samples=len(data), workers=8, samples_per_worker=16, epochs=3, lr=2e-3, shape="cosine")
run = lb.distribute(model, optimizer, seed=0, bn_group=8)
start = lb.load(state, run) if state and state.exists() else 0
shuffle = lb.GlobalShuffle(data, schedule, seed=0, start=start)
loader = DataLoader(data, batch_sampler=shuffle, num_workers=1)

for step in shuffle.steps(loader):
    for group in optimizer.param_groups:
        group["lr"] = step.lr
    for part in step.workers:
        with run.part(part):
            run.backward(criterion(run.model(part.inputs), part.labels))
    verdict = run.reduce(step)
    if verdict:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    if step.step % 8 == 7:
        if state:
            lb.save(state, run)
        if world.rank == 0:
            print(f"step {step.step}: epoch {step.epoch}, lr {step.lr:.6f}, loss {verdict.loss:.9f}")

if world.rank == 0:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    print(f"weights {digest.hexdigest()}")
