"""Train a model of one's own on any number of ranks, to the same bits:

    mpirun -np 1 python docs/examples/train_any_ranks.py
    mpirun -np 3 --oversubscribe python docs/examples/train_any_ranks.py
    torchrun --nproc-per-node 2 docs/examples/train_any_ranks.py
"""

import hashlib
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpc_lbsgd as lb

world = lb.init()

labels = torch.arange(900) % 10
images = torch.randn(900, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1) / 4
data = TensorDataset(images, labels)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16 * 36, 10)
).to(world.device)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
criterion = nn.CrossEntropyLoss(reduction="none")

schedule = lb.Schedule(samples=len(data), workers=8, samples_per_worker=16, epochs=3, lr=2e-3, shape="cosine")
run = lb.distribute(model, optimizer, seed=0, bn_group=8)
start = lb.load(sys.argv[1], run) if len(sys.argv) > 1 else 0
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
    if world.rank == 0 and step.step % 8 == 0:
        print(f"step {step.step}: epoch {step.epoch}, lr {step.lr:.5f}, loss {verdict.loss:.6f}")

lb.save("any_ranks.pt", run)
if world.rank == 0:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    print(f"weights on {world.size} ranks: {digest.hexdigest()}")
