"""Which device a rank takes, of GPUs that this machine does not have: torch is asked by its own functions."""

import pytest
import torch

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import gpus as lost_gpus
from hpc_lbsgd.parallel.world import World
from hpc_lbsgd.train import job


@pytest.fixture
def gpus(monkeypatch):
    def there(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    return there


@pytest.mark.parametrize("visible, local_rank, index", [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 5, 0)])
def test_a_rank_takes_its_place_or_the_one_it_sees(gpus, visible, local_rank, index):
    """--gpus-per-node shows all of them to each rank, --gpus-per-task one."""
    gpus(visible)
    assert job.choose_device(World(local_rank, 8, local_rank, 8)) == torch.device("cuda", index)


def test_more_ranks_than_gpus_are_refused(gpus):
    gpus(4)
    with pytest.raises(RequestError, match="rank 6 is the 7th on its node, which shows 4 GPUs"):
        job.choose_device(World(6, 8, 6, 8))
    shared = [("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("a", "GPU-2")]  # one visible GPU, the same for two
    with pytest.raises(RequestError, match="ranks 1 and 3 on a have the same GPU"):
        job.refuse_shared(shared)
    job.refuse_shared(shared[:3])
    job.refuse_shared([("a", None)] * 4)


def test_a_gpu_node_does_not_train_on_its_cpu_in_silence(gpus, tmp_path, monkeypatch):
    """A driver too old for torch, a torch without CUDA, or a node that has lost its driver."""
    gpus(0)
    driver = tmp_path / "version"
    monkeypatch.setattr(lost_gpus.lost, "__defaults__", (driver,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert job.choose_device(World(0, 1, 0, 1)).type == "cpu"  # no NVIDIA driver: a CPU node
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as Slurm has it
    given = r"rank 0 on .*: a GPU was given to the job \(CUDA_VISIBLE_DEVICES=0,1\), but this node has no NVIDIA driver"
    with pytest.raises(RequestError, match=given):
        job.choose_device(World(0, 1, 0, 1))
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02\nGCC version: 12\n")
    with pytest.raises(RequestError, match=r"NVIDIA GPUs, and torch .* cannot use them \(driver: NVRM .*470.57.02\)"):
        job.choose_device(World(0, 1, 0, 1))
    for none in ("", " ", "-1", "-1,0", "none", "void", "NoDevFiles"):  # CUDA takes each of them for that
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert job.choose_device(World(0, 1, 0, 1)).type == "cpu"
    driver.unlink()
    for some in ("0,-1", "GPU-8932f937-d72c", "MIG-GPU-8932f937-d72c/1/0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", some)
        with pytest.raises(RequestError, match="a GPU was given to the job"):
            job.choose_device(World(0, 1, 0, 1))
