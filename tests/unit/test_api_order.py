"""The library's schedules, its global shuffle and what is random in a sample: without ranks."""

import random

import numpy as np
import pytest
import torch
from test_api import N, small_data, small_schedule
from torch.utils.data import DataLoader, TensorDataset

import hpc_lbsgd as lb


def test_ranks_share_out_what_one_rank_has_and_tails_are_short():
    schedule = small_schedule(workers=3, epochs=2)
    alone = list(lb.GlobalShuffle(N, schedule, seed=4, rank=0, size=1))
    ranks = [iter(lb.GlobalShuffle(N, schedule, seed=4, rank=r, size=4)) for r in range(4)]
    together = []
    for number in range(schedule.steps):
        point = schedule.at(number)
        for worker in range(3):
            if point.worker_range(worker)[0] < point.worker_range(worker)[1]:
                together.append(next(ranks[worker % 4]))
    assert together == alone and all(next(r, None) is None for r in ranks)
    epoch = [i for part in alone[: len(alone) // 2] for i in part]
    assert sorted(epoch) == list(range(N))
    assert len(lb.GlobalShuffle(N, schedule, rank=3, size=4)) == 0
    resumed = lb.GlobalShuffle(N, schedule, seed=4, start=5, rank=0, size=1)
    assert list(resumed) == alone[15:] and len(resumed) == len(alone) - 15


class Noisy(TensorDataset):
    def __getitem__(self, index):
        return torch.rand(1) + random.random() + np.random.rand(), super().__getitem__(index)[1]


def test_random_transforms_draw_the_same_in_any_process():
    schedule, noisy = small_schedule(epochs=2), Noisy(*small_data().tensors)
    found = []
    for processes in (0, 2):
        shuffle = lb.GlobalShuffle(N, schedule)
        before = torch.get_rng_state()
        loader = DataLoader(lb.Keyed(noisy, seed=3), batch_sampler=shuffle, num_workers=processes)
        found.append([part.inputs for step in shuffle.steps(loader) for part in step.workers])
        assert processes == 0 or len(torch.cat(found[-1]).unique()) > 1.9 * N  # another draw in each epoch
        torch.set_rng_state(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain = small_data()
    state = random.getstate(), torch.get_rng_state()
    lb.Keyed(Noisy(*plain.tensors))[5]
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_a_schedule_is_the_recipes(tmp_path):
    made = lb.Schedule(samples=50_000, workers=8, samples_per_worker=16, epochs=200, lr=0.1, milestones=(60, 120, 160),
                       factor=5, last_batch="drop")  # fmt: skip
    assert [made.at(made.first_step(e)).lr for e in (0, 60, 120, 160)] == [0.1, 0.1 / 5, 0.1 / 25, 0.1 / 125]
    read = lb.Schedule.of_recipe("smith-cifar10-original", 50_000)
    assert read.steps == made.steps and read.at(30_000).lr == pytest.approx(made.at(30_000).lr)
    for wrong, said in (
        ({"workers": 0}, "workers=0"),
        ({"milestones": (2, 1)}, "milestones"),
        ({"milestones": (1,), "shape": "cosine"}, "one or the other"),
        ({"warmup_epochs": 3}, "warmup_epochs"),
        ({"workers": 400, "last_batch": "drop"}, "more than 203"),
    ):
        with pytest.raises(lb.RequestError, match=said):
            small_schedule(**wrong)
    kept = tmp_path / "mine.yaml"
    kept.write_text("batch: {workers: per_rank}\n")
    assert lb.Schedule.of_recipe(str(kept), 1000, workers=4).at(0).global_batch == 128
    kept.write_text("batch: {workers: 2}\nschedule: {kind: adaptive-batch}\n")
    for name, more, said in (
        ("goyal-resnet50", {}, "per_rank; say how many"),
        ("smith-cifar10-original", {"workers": 3}, "has batch.workers = 1"),
        (str(kept), {}, "adaptive-batch is decided by the trainer"),
    ):
        with pytest.raises(lb.RequestError, match=said):
            lb.Schedule.of_recipe(name, 50_000, **more)
