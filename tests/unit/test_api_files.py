"""The library's data, schedules and files under habits of PyTorch scripts: each is right, or refused by name."""

import random
import threading
from collections import UserDict

import numpy as np
import pytest
import torch
from test_api import N, compute, small_data, small_schedule, train
from test_api_habits import all_steps, distributed, trained
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import hpc_lbsgd as lb
from hpc_lbsgd.api import state
from hpc_lbsgd.train.replica import weights_sha256

pytestmark = pytest.mark.usefixtures("world")


# ---------------------------------------------------------------- data


def test_parts_of_another_rank_are_refused():
    run, shuffle = distributed(), lb.GlobalShuffle(N, small_schedule(), rank=0, size=2)
    with pytest.raises(lb.RunError, match="is of rank 0 of 2, and this is rank 0 of 1"):
        train(run, shuffle, small_data())
    with pytest.raises(lb.RequestError, match="object has no length"):
        lb.GlobalShuffle(object(), small_schedule())
    assert len(lb.GlobalShuffle(np.int64(N), small_schedule())) == len(lb.GlobalShuffle(N, small_schedule()))


def lists(rows):
    return [image for image, _ in rows], torch.tensor([int(label) for _, label in rows])


def end_to_end(rows):
    ends = torch.arange(len(rows) + 1)
    return UserDict(ends=ends, inputs=torch.cat([i.flatten() for i, _ in rows]), labels=lists(rows)[1])


@pytest.mark.parametrize("collate", [list, lists, end_to_end])
def test_batches_of_lists_and_of_samples_laid_end_to_end_are_taken(collate):
    shuffle = lb.GlobalShuffle(N, small_schedule(), seed=1)
    loader = DataLoader(small_data(), batch_sampler=shuffle, collate_fn=collate)
    assert sum(part.count for step in shuffle.steps(loader) for part in step.workers) == 3 * N
    fewer = DataLoader(small_data(), batch_sampler=shuffle, collate_fn=lambda rows: collate(rows[:-1]))
    if collate is not end_to_end:  # whose 7 samples have 8 ends
        with pytest.raises(lb.RunError, match="for worker 0, which has 8"):
            next(next(shuffle.steps(fewer)).workers)


def test_batches_go_to_the_device_whatever_holds_them():
    from hpc_lbsgd.api.shuffle import on

    class Graph:
        def to(self, device):
            return device

    meta = torch.device("meta")
    moved = on(meta, UserDict(x=torch.ones(2), graph=Graph()))
    assert moved["x"].device == moved["graph"] == meta


class Noisy(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.rand(1), 0


@pytest.mark.parametrize("wrap", [lambda d: Subset(d, range(N)), lambda d: ConcatDataset([d])])
def test_keyed_data_is_outermost(wrap):
    shuffle = lb.GlobalShuffle(N, small_schedule())
    with pytest.raises(lb.RequestError, match="lb.Keyed is inside of"):
        next(shuffle.steps(DataLoader(wrap(lb.Keyed(Noisy())), batch_sampler=shuffle)))
    parts = next(shuffle.steps(DataLoader(lb.Keyed(wrap(Noisy())), batch_sampler=shuffle))).workers
    assert len(next(parts).inputs) == 8


@pytest.mark.parametrize(
    "given, said",
    [
        ({"samples": 203.0}, "samples=203.0.*a whole number"),
        ({"epochs": "3"}, "epochs='3'.*a whole number"),
        ({"milestones": (1.5,)}, "milestones=1.5.*a whole number"),
        ({"max_steps": 0}, "max_steps=0.*at least 1"),
        ({"measure_every": -1}, "measure_every=-1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": -0.1}, "lr=-0.1"),
        ({"factor": 0, "milestones": (1,)}, "factor=0"),
        ({"warmup_start_lr": float("inf")}, "warmup_start_lr=inf"),
        ({"workers": 1, "measure_every": 5}, "several workers in a full step, and workers=1"),
        ({"workers": 40, "measure_every": 5}, "a full step has 320 samples"),
    ],
)
def test_what_is_no_schedule_is_named(given, said):
    with pytest.raises(lb.RequestError, match=said):
        small_schedule(**given)


# ---------------------------------------------------------------- files


def test_numbers_of_numpy_come_back(tmp_path):
    schedule = small_schedule(lr=np.float32(0.1), samples=np.int64(N))
    assert type(schedule.at(0).lr) is float
    run = distributed()
    run.optimizer.param_groups[0]["lr"] = np.float64(0.25)
    lb.save(tmp_path / "state.pt", run)
    again = distributed()
    lb.load(tmp_path / "state.pt", again)
    assert again.optimizer.param_groups[0]["lr"] == 0.25
    whole = (tmp_path / "state.pt").read_bytes()
    run.optimizer.param_groups[0]["why"] = threading.Thread
    with pytest.raises(lb.RequestError, match="keeps threading.Thread"):
        lb.save(tmp_path / "state.pt", run)
    assert (tmp_path / "state.pt").read_bytes() == whole


def test_a_file_goes_on_where_it_ended_and_with_its_optimizer(tmp_path):
    plainly, run = trained(distributed()), distributed()
    trained(run, 2)
    lb.save(tmp_path / "state.pt", run)
    run = distributed()
    lb.load(tmp_path / "state.pt", run)
    with pytest.raises(lb.RunError, match=r"go on from step 2, and this is step 0: .*start=2.*run.step = 0"):
        trained(run, 1)
    assert trained(run, start=2) == plainly
    lb.load(tmp_path / "state.pt", run)
    run.step = 0
    trained(run, 1)
    with pytest.raises(lb.RequestError, match="written with SGD, whose state AdamW cannot"):
        lb.load(tmp_path / "state.pt", distributed(optimizer=lambda m: torch.optim.AdamW(m.parameters())))
    compute(run, next(all_steps()))
    with pytest.raises(lb.RunError, match="lb.load: inside a step"):
        lb.load(tmp_path / "state.pt", run)


def test_a_file_with_a_changed_bit_is_refused_or_the_same(tmp_path):
    run = distributed(optimizer=lambda m: torch.optim.Adam(m.parameters()))
    trained(run, 1)
    lb.save(tmp_path / "state.pt", run)
    whole, want, draw = (tmp_path / "state.pt").read_bytes(), weights_sha256(run.model), random.Random(0)
    refused = 0
    for _ in range(60):
        torn = bytearray(whole)
        torn[draw.randrange(len(torn))] ^= 1 << draw.randrange(8)
        (tmp_path / "torn.pt").write_bytes(torn)
        try:
            lb.load(tmp_path / "torn.pt", run)
        except lb.RequestError:
            refused += 1
        assert weights_sha256(run.model) == want
    assert refused > 30


def test_a_save_that_no_other_rank_joins_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(state, "ALONE_S", 0.0)
    run, said = distributed(), threading.Event()
    monkeypatch.setattr(state.sys.stderr, "flush", said.set, raising=False)
    monkeypatch.setattr(run.replica, "check_equal", lambda when: said.wait(60))  # as where the others do not come
    lb.save(tmp_path / "state.pt", run)
    assert "lb.save on rank 0: waiting for other ranks" in capsys.readouterr().err
    said.clear()
    monkeypatch.setattr(run.replica.engine, "start_sum", lambda *_: said.wait(60))
    monkeypatch.setattr(run.replica.engine, "wait", lambda handle: None)
    lb.evaluate(run, small_data(), {})
    assert "lb.evaluate on rank 0: waiting for other ranks" in capsys.readouterr().err


# ---------------------------------------------------------------- loops and draws that only look right


class Drawn(Dataset):
    """Noise, from torch's generator as it stands, or seeded for each sample."""

    def __init__(self, seeded):
        self.seeded, self.plain = seeded, small_data()

    def __len__(self):
        return N

    def __getitem__(self, index):
        if self.seeded:
            torch.manual_seed(int(index))
        image, label = self.plain[int(index)]
        return image + torch.randn(1, 8, 8), label


def test_random_transforms_that_would_follow_the_ranks_are_said(recwarn):
    said = []
    for data in (Drawn(False), lb.Keyed(Drawn(False)), Drawn(True), small_data()):
        shuffle = lb.GlobalShuffle(data, small_schedule())
        shuffle.steps(DataLoader(data, batch_sampler=shuffle))
        said.append([str(w.message) for w in recwarn])
        recwarn.clear()
    assert [len(words) for words in said] == [1, 0, 0, 0] and "Drawn draws from a global generator" in said[0][0]


class Backwards(Dataset):
    """A wrapper that keeps what is inside under a name of its own."""

    def __init__(self, inside):
        self.inside = inside

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.inside[N - 1 - index]


def test_a_keyed_set_that_is_not_told_the_epoch_is_found_under_any_name():
    data = Backwards(lb.Keyed(Drawn(False)))
    shuffle = lb.GlobalShuffle(data, small_schedule())
    with pytest.raises(lb.RequestError, match="lb.Keyed is inside of Backwards"):
        shuffle.steps(DataLoader(data, batch_sampler=shuffle))


def test_a_loop_of_epochs_around_all_epochs_is_said(recwarn):
    run, data = distributed(), small_data()
    shuffle = lb.GlobalShuffle(N, small_schedule(epochs=2, warmup_epochs=0))
    train(run, shuffle, data)
    assert not recwarn
    train(run, shuffle, data, steps=1)
    assert ["No loop of epochs" in str(w.message) for w in recwarn] == [True]


def test_arguments_in_torchs_order_are_named(tmp_path):
    run = distributed()
    for call in (lb.save, lb.load):
        with pytest.raises(lb.RequestError, match=f"lb.{call.__name__}.path, run.: got Run, "):
            call(run, tmp_path / "state.pt")


class Named(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"inputs": torch.ones(1, 8, 8), "labels": index}


def test_what_an_evaluation_cannot_go_through_is_named():
    run, data = distributed(), small_data()
    for wrong, metrics, said in (
        (DataLoader(data), {}, "DataLoader, dict.: wants a data set"),
        (data, [len], "TensorDataset, list.: wants a data set"),
        (Named(), {}, "samples of Named come as dict, not as .inputs, labels."),
        (ThreeParts(), {}, "come as 3 parts"),
    ):
        with pytest.raises(lb.RequestError, match=said):
            lb.evaluate(run, wrong, metrics)


class ThreeParts(Named):
    def __getitem__(self, index):
        return torch.ones(1, 8, 8), index, index


def test_a_model_without_values_is_named():
    with torch.device("meta"):
        empty = torch.nn.Linear(64, 4)
    with pytest.raises(lb.RequestError, match="weight is on the meta device"):
        lb.distribute(empty, torch.optim.SGD(empty.parameters(), 0.1))
