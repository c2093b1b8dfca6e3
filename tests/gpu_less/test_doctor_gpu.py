"""What `doctor` and `bench loader` do on a machine with a GPU, where there is none."""

import pytest
import torch
from conftest import write_images

from hpc_lbsgd.bench.loader.measure import contestants
from hpc_lbsgd.cluster import gpu_checks
from hpc_lbsgd.data import loader
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.recipe import Data


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
    told = {("nvidia-smi",): "CUDA Version: 13.1"}
    monkeypatch.setattr(gpu_checks, "output_of", lambda *words, **named: told.get(words, "590.1"))


@pytest.mark.parametrize(
    "nvjpeg, level", [("13.3.2.43", "ok"), ("13.0.1.86", "warn"), ("12.4.0.76", "warn"), (None, None)]
)
@pytest.mark.parametrize("problem", [None, "RuntimeError: Failed to find C compiler"])
def test_who_makes_kernels_and_who_decodes_is_looked_at(gpu, nvjpeg, level, problem, monkeypatch):
    monkeypatch.setattr(gpu_checks, "version", lambda package: nvjpeg)
    monkeypatch.setattr(gpu_checks, "why_not", lambda device: problem)
    found = {f.what: f for f in gpu_checks.check_gpus()}
    assert found["torch's compiler"].level == ("warn" if problem else "ok")
    assert (found["nvjpeg"].level if level else "nvjpeg" in found) == (level or False)


def test_our_loader_is_measured_on_the_gpu_too(gpu, tmp_path, monkeypatch):
    m = trees.index(write_images(tmp_path / "d", 8, 16), processes=1)
    data = Data(channels=1, image_size=16, augment="flip", mean=[0.0], std=[1.0])
    asked = []
    monkeypatch.setattr(loader, "create", lambda *words: asked.append(words[-2]) or 1 / 0)
    for contestant in contestants([str(m.path)], data, 4, peers=False):
        with pytest.raises(ZeroDivisionError):
            next(contestant.start(1))
    assert [device.type for device in asked] == ["cpu", "cuda"]
