"""What the thread that trains is left with: to start copies, of tensors that others made, pinned and laid out."""

import threading

import numpy as np
import pytest
import torch
from conftest import write_images

from hpc_lbsgd.data import loader
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.user import UserSet
from hpc_lbsgd.recipe import Data

GPU = torch.device("cuda", 3)
DATA = Data(channels=1, image_size=16, augment="none", eval_resize=0, mean=[0.0], std=[1.0], loader="torchvision")


def pictures(part):
    return [(torch.full((3, 8, 8), float(i)), i) for i in range(16)]


@pytest.mark.parametrize("kind", ["torchvision", "user"])
def test_batches_are_pinned_where_they_are_made_and_copied_without_a_wait(kind, tmp_path, monkeypatch):
    main, done = threading.current_thread(), []
    own_to, own_contiguous = torch.Tensor.to, torch.Tensor.contiguous

    def pin(tensor):
        done.append(("pin", threading.current_thread() is main))
        return tensor

    def to(tensor, *args, **named):
        if GPU not in args:
            return own_to(tensor, *args, **named)
        done.append(("copy", threading.current_thread() is main, named))
        return tensor

    def contiguous(tensor, **named):
        if threading.current_thread() is main:
            done.append(("layout", any(d[0] == "copy" for d in done[-1:])))
        return own_contiguous(tensor, **named)

    devices = set()
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.add((threading.get_ident(), device)))
    if kind == "user":
        found = UserSet("test_placing:pictures", "train")
    else:
        found = trees.index(write_images(tmp_path / "d", 16, 16), processes=1)
    made = loader.create(DATA, found, 3, True, 8, 2, 2, True, GPU)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    batches = list(made.batches([Request(0, np.arange(8)), Request(0, np.arange(8, 16))]))
    assert all(b.inputs.is_contiguous(memory_format=torch.channels_last) for b in batches)
    pins, copies = ([d for d in done if d[0] == what] for what in ("pin", "copy"))
    assert len(pins) == len(copies) == 4
    assert not any(d[1] for d in pins) and all(d[1] and d[2] == {"non_blocking": True} for d in copies)
    assert devices and all(d == GPU for _, d in devices)  # each thread has a current device of its own
    assert all(d[1] for d in done if d[0] == "layout")  # after the copy: on the device
