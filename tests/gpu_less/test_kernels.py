"""Kernels of fixed point, in C for CPUs and by Triton for GPUs: equal to torch's operations to the bit. Triton's run
under its interpreter here, and are compiled ahead of time for the GPUs that are named."""

import importlib.util
import sys

import pytest
import torch
from test_graphs import Alone

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.parallel import fixed_point
from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.train import step
from hpc_lbsgd.train.replica import Replica, weights_sha256

CPU = torch.device("cpu")
WHERE = importlib.util.find_spec("hpc_lbsgd").submodule_search_locations[0] + "/parallel/kernels.py"


def load(name: str):
    """The module once more: whether Triton interprets is settled when it reads a kernel."""
    spec = importlib.util.spec_from_file_location(name, WHERE)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["C", "Triton"])
def kernels(request, monkeypatch):
    if request.param == "C":
        found = fixed_point.kernels_for(CPU, torch.float32)
        return found or pytest.skip("the package's C part is not compiled: no C compiler when it was installed")
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return load("interpreted_kernels")


def odd_values(size: int) -> torch.Tensor:
    """float32 of all magnitudes, halves that must go to the even side, and edges of what has a fraction."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(size, generator=generator) * 2.0 ** torch.randint(-60, 22, (size,), generator=generator)
    edges = [0.5, 1.5, 2.5, 2.0**23 - 0.5, 2.0**23, 2.0**22 + 0.5, 2.0**24 + 2, 1e-45, 0.0]
    edges = torch.tensor([e * s for e in edges for s in (1, -1)]) * 2.0**-20
    values[: len(edges)] = edges
    return values


@pytest.mark.parametrize("bits", [20, 40])
def test_kernels_round_as_torch_does(kernels, bits):
    size, statistics, finer = 5000, 70, 2.0 ** max(0, 30 - bits)  # more than two programs, the last not full
    model = torch.nn.Linear(size - 1, 1)
    layouts = plan_layouts(model.named_parameters(), set(), statistics, 2**30, 2**30)
    found = []
    for chosen in (None, kernels):
        buckets = Buckets(layouts, Alone(), CPU, torch.float32, bits=bits)
        buckets.fixed.kernels = chosen
        (bucket,) = buckets.buckets
        assert buckets.fixed.finer == finer
        buckets.begin(3)
        for last in (False, False, True):
            buckets.arm(last)
            values = odd_values(len(bucket.gradients))
            values[-40:] = 2.0 ** (61 - bits)  # beyond a third of the range
            bucket.gradients.copy_(values if not last else values.flip(0))
            buckets.end_pass()
            if not last:
                assert not bucket.gradients.any()
        total = buckets.fixed.totals[0].clone()
        buckets.finish()
        found.append((total, bucket.gradients.clone(), bool(buckets.fixed.out_of_range)))
    (a, ga, bad_a), (b, gb, bad_b) = found
    assert torch.equal(a, b) and torch.equal(ga, gb) and a.unique().numel() > size // 3
    assert bad_a and bad_b


@pytest.mark.parametrize(
    "value, bad", [(1.0, False), (2.0**20, False), (2.0**60, True), (float("-inf"), True), (float("nan"), True)]
)
def test_what_does_not_fit_is_flagged(kernels, value, bad):
    x, totals = torch.zeros(3000), torch.zeros(3000, dtype=torch.int64)
    x[2999] = value
    flag = torch.zeros((), dtype=torch.bool)
    kernels.add(x, totals, flag, 0, 2.0**40, 2.0**40, 2.0**62 / 3, True, True)
    assert bool(flag) == bad and not x.any()


def test_what_does_not_see_a_nan_is_refused(kernels, monkeypatch):
    """As C does that was compiled with -ffast-math."""
    fixed_point.refuse_wrong(kernels, CPU)
    own = kernels.add
    monkeypatch.setattr(kernels, "add", lambda x, *others: own(x.nan_to_num(), *others))
    with pytest.raises(ArithmeticError, match="and nan: .*, flag False"):
        fixed_point.refuse_wrong(kernels, CPU)


def test_ranks_compare_and_count_what_kernels_made(kernels, monkeypatch):
    """A node whose kernels are wrong is not found by what its torch would have made. What is out of range is the same
    to those with and without."""
    layouts = plan_layouts(torch.nn.Linear(2999, 1).named_parameters(), set(), 70, 2**30, 2**30)
    values = odd_values(layouts[0].size)
    values[500:505] = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e30, 2.0**62])
    own = kernels.add

    def wrong(gradients, totals, *others, **more):
        own(gradients, totals, *others, **more)
        totals[1000] += 1

    found = []
    for chosen, add in ((None, own), (kernels, own), (kernels, wrong)):
        buckets, seen = Buckets(layouts, Alone(), CPU, torch.float32, bits=40), []
        monkeypatch.setattr(kernels, "add", add)
        fixed, (bucket,) = buckets.fixed, buckets.buckets
        fixed.kernels = chosen
        buckets.begin(3, count_flushed=True)
        for apart, last in ((False, False), (True, False), (False, True)):
            bucket.gradients.copy_(values)
            fixed.add(0, last, lambda index, whole, into=seen: into.append(whole.clone()), apart)
            fixed.end_pass() if not apart else None
            assert last or not bucket.gradients.any()
        monkeypatch.setattr(kernels, "add", own)
        found.append((*seen, fixed.totals[0].clone(), buckets.flushed, fixed.out_of_range))
    without, right, other = found
    assert all(torch.equal(a, b) for a, b in zip(without, right, strict=True)) and 0 < right[-2][1] < right[-2][0]
    for one, another in zip(right[:4], other[:4], strict=True):
        assert torch.nonzero(one != another).flatten().tolist() == [1000] and one.dtype == torch.int64


def test_a_run_with_kernels_has_the_bits_of_one_without(kernels, monkeypatch):
    """Uneven passes, statistics, dropout, steps that compare ranks and steps that count."""
    content = {
        "model": {"name": "resnet8", "widths": [8, 8, 8], "dropout": 0.2, "zero_gamma": False},
        "batch": {"samples_per_worker": 8, "workers": 3, "bn_group": 4},
        "data": {"channels": 1, "mean": [0.0], "std": [1.0]},
        "determinism": "any-ranks",
        "fixed_point_bits": 24,
        "machine": {"cross_check_steps": 3},
    }
    recipe, hashes, calls = recipes.Recipe.model_validate(content), [], []
    schedule = recipe.build_schedule(24 * 3 + 11)
    own = kernels.add
    monkeypatch.setattr(kernels, "add", lambda *a, **k: calls.append(1) or own(*a, **k))
    for chosen in (None, kernels):
        replica = Replica(recipe, 4, Alone(), CPU)
        replica.buckets.fixed.kernels = chosen
        assert replica.buckets.rounded_by == (chosen.MADE_BY if chosen else "torch")  # on record
        torch.manual_seed(0)
        for number in range(5):
            point = schedule.at(number)
            sizes = [stop - start for j in range(3) for start, stop in [point.worker_range(j)] if stop > start]
            if step.Passes(recipe, 0, 1, [0]).pair_at(point):
                sizes.insert(0, sizes[0])
            batches = iter([(torch.randn(n, 1, 8, 8), torch.arange(n) % 4, 0) for n in sizes])
            outcome = step.Stepper(replica, recipe, batches, partners=None).run(point)
            assert outcome.finite
        hashes.append(weights_sha256(replica.model))
    assert hashes[0] == hashes[1] and len(calls) > 10


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_of_time(capability, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = load(f"compiled_kernels_{capability}")
    numbers = dict.fromkeys(("scale", "statistics_scale", "largest", "unit", "statistics_unit"), "fp32")
    types = {"gradients": "*fp32", "totals": "*i64", "flag": "*u8", "size": "i32", "statistics": "i32", **numbers}
    for kernel in (module._add, module._take):
        constants = {"FIRST": False, "CLEAR": True, "BLOCK": module.BLOCK}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        constants = {(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"] and ".f64" not in made.asm["ptx"]


def test_a_node_where_kernels_cannot_be_made_goes_on_without_and_says_so(monkeypatch):
    def fail(kernels, device):
        raise RuntimeError("no cc")

    assert fixed_point.kernels_for(CPU, torch.float64) is None
    monkeypatch.setattr(fixed_point, "refuse_wrong", fail)
    with pytest.warns(UserWarning, match=r"^no kernels here \(RuntimeError: no cc\): fixed point takes torch's"):
        assert fixed_point.kernels_for(torch.device("cuda", 0), torch.float32) is None


def test_what_is_wrong_on_its_way_back_is_refused(kernels, monkeypatch):
    for name in ("take", "take_int32") if hasattr(kernels, "take_int32") else ("take",):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, lambda totals, gradients, *others: gradients.copy_(totals))
            with pytest.raises(ArithmeticError, match="3/4 in quarters and halves, and 0.75"):
                fixed_point.refuse_wrong(kernels, CPU)
