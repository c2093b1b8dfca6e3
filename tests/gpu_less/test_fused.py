"""What compiled parts ask of a GPU, by the rule that torch's compiler goes by: tools/gpu_fused.py."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from gpu_fused import COMPILED, Fused

from hpc_lbsgd.train import ghost

G, N, C, SIDE = 8, 4, 16, 8
HALF = 2 * G * N * C * SIDE**2  # bytes of the layer's input in bf16


@pytest.fixture
def costs():
    """{(forward or backward): [kernels, bytes]} of a compiled function, run on meta in bf16."""

    def of(function, *inputs) -> list[tuple[int, int]]:
        found, ran = [], []
        with Fused(lambda name, launches, touched: ran.append(touched)) as compiler:
            outputs = compiler.compiled(function, dynamic=False)(*inputs)
            found.append((len(ran), sum(ran)))
            ran.clear()
            outputs[0].sum().backward()
            found.append((len(ran), sum(ran)))
        return found

    yield of
    torch._dynamo.reset()


def inputs():
    x = torch.empty(G * N, C, SIDE, SIDE, device="meta", dtype=torch.bfloat16, requires_grad=True)
    return x, *(torch.empty(C, device="meta", requires_grad=True) for _ in range(2))


def test_groups_at_once_read_and_write_as_often_as_one_call(costs):
    """Forward reads twice and writes once; backward reads two tensors twice and writes one: all in bf16."""

    def norm(x, weight, bias):
        y, measured = ghost.batch_norm(x, G, weight, bias, 1e-5)
        return F.relu(y), measured

    (launched, forward), (back, backward) = costs(norm, *inputs())
    assert launched == 2 and 3 * HALF <= forward < 3.6 * HALF  # and where it was above zero, a byte each
    assert back <= 4 and 5 * HALF < backward < 7.2 * HALF  # and that again, twice


def test_what_is_wanted_by_products_alone_is_written(costs):
    def two(x, weight, bias):
        y = (x * 2 + 1).sin()
        return (F.conv2d(y, torch.ones(C, C, 1, 1, device="meta", dtype=torch.bfloat16)),)

    (launched, forward), _ = costs(two, *inputs())
    assert launched == 3 and 4 * HALF <= forward < 4.2 * HALF  # ones, y, the product


def test_names_tell_products_from_the_rest():
    ran = []
    with Fused(lambda name, launches, touched: ran.append((name, launches))) as compiler:
        x, w = (torch.empty(4, 4, 4, 4, device="meta", requires_grad=True) for _ in range(2))
        compiler.compiled(lambda x, w: F.conv2d(x.sin(), w))(x, w).sum().backward()
    assert ("convolution", 1) in ran and ("convolution_backward", 2) in ran and (COMPILED, 1) in ran
    torch._dynamo.reset()
