"""What `precision` means to the libraries that multiply."""

import pytest
import torch
from test_workers import small_recipe

from hpc_lbsgd.train.job import configure_torch
from hpc_lbsgd.train.replica import DTYPES


@pytest.fixture(autouse=True)
def torchs_own():
    """Settings of the process, put back."""
    cudnn = torch.backends.cudnn
    backends = (cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before, threads = [b.fp32_precision for b in backends], torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    allowed = cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize(
    "precision, expected", [("float32", "ieee"), ("float64", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")]
)
def test_gpus_take_what_the_recipe_says(precision, expected):
    """torch convolves float32 as tf32 unless told otherwise."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # as a library's allow_tf32 has it
    configure_torch(small_recipe(precision=precision))
    assert torch.backends.cudnn.conv.fp32_precision == expected
    assert torch.backends.cuda.matmul.fp32_precision == expected
    allowed = expected == "tf32"  # by the old words, which libraries and torch.export ask for
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    assert DTYPES[precision] == (torch.float64 if precision == "float64" else torch.float32)
