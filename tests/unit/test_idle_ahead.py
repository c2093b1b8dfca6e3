"""A batch that was fetched ahead of a step without samples on this rank is kept for the step that it is for."""

import pytest
import torch
from test_workers import CPU, engine, point_of, small_recipe  # noqa: F401

from hpc_lbsgd.train import control, step
from hpc_lbsgd.train.replica import Replica


class Second:
    """Rank 1 of 2; rank 0, which has the first worker, adds that worker's samples and nothing else."""

    rank, size = 1, 2

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def start_sum(self, tensor, name, *more, **named):
        if name == "control":
            tensor[control.COUNT] += 8
        return self.real.start_sum(tensor, name, *more, **named)


@pytest.mark.parametrize("idle", [1, 2])
def test_an_idle_step_loses_no_batch(engine, idle):  # noqa: F811
    recipe = small_recipe()
    replica = Replica(recipe, 5, Second(engine), CPU)
    counts = [16, *[8] * idle, 16, 16]  # this rank's worker is the second of two: a tail of one has none for it
    torch.manual_seed(0)
    made = [(torch.randn(8, 1, 12, 12), torch.randint(0, 5, (8,)), 0) for count in counts if count == 16]
    seen = []
    forward, replica.forward = replica.forward, lambda images, groups: seen.append(images) or forward(images, groups)
    stepper = step.Stepper(replica, recipe, iter(made))
    for number, count in enumerate(counts):
        assert stepper.run(point_of(workers=2, count=count, number=number)).count == count
    assert len(seen) == len(made) and all(images is batch[0] for images, batch in zip(seen, made, strict=True))
