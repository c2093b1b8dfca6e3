"""Sums in int32: what they hold, how their units follow, and a step that they cannot hold."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_workers import CPU, batches, engine, point_of, small_recipe  # noqa: F401

from hpc_lbsgd import plan
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.parallel import fixed_point
from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.parallel.scales import Scales, halves
from hpc_lbsgd.theory import units
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train import step
from hpc_lbsgd.train.replica import Replica, weights_sha256


class Layers(torch.nn.Module):
    """Three tensors, one of them of one element, one empty."""

    def __init__(self):
        super().__init__()
        self.weight, self.one = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))
        self.none = torch.nn.Parameter(torch.zeros(0))


def buckets_of(exponents):
    layouts = plan_layouts(Layers().named_parameters(), set(), 0, 2**20, 2**20, narrow=True)
    buckets = Buckets(layouts, None, CPU, torch.float32, bits=40, int32=True)
    buckets.scales.exponents = exponents
    return buckets


def signs_of(kind, k):
    """(k, 6), as bad as can be."""
    turn = np.arange(k)[:, None] * np.ones(6)
    return {"same": turn * 0 + 1, "turns": (-1.0) ** turn, "one worker": np.where(turn == k // 2, -1.0, 1e-3),
            "idle between": -1.0 * (turn % 3 == 0)}[kind]  # fmt: skip


@settings(max_examples=15)
@given(
    st.sampled_from([1, 2, 3, 37, 256, 4096]), st.sampled_from([0.3, 1 - 2e-6, 1.001, 1.5, 40.0]),
    st.sampled_from(["same", "turns", "one worker", "idle between"]), st.integers(-60, 60), st.integers(0, 99),
)  # fmt: skip
def test_what_passes_the_test_has_not_wrapped(k, share, signs, exponent, seed):
    """S is `share` of int32's range, or beyond it. Where the test holds, totals are the exact sums of what each worker
    rounded: of all of them, and of the first few, as a rank adds them up."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.25, 1, (k, 6)) * signs_of(signs, k) * 2.0 ** rng.integers(-3, 1, (k, 1))
    values = np.float32(values * share * 2.0**31 / np.abs(values).max(1).sum() * 2.0**-exponent)
    scaled = values.astype(np.float64) * 2.0**exponent
    buckets = buckets_of({"weight": exponent, "one": 0})
    buckets.begin(k)
    (bucket,) = buckets.buckets
    start = next(view.offset for view in bucket.layout.views if view.name == "weight")
    totals, slot = buckets.fixed.sums(0)[start : start + 6], buckets.scales.names.index("weight")
    exact, expected = np.zeros(6, np.int64), 0
    for i, (worker, whole) in enumerate(zip(values, scaled, strict=True)):
        bucket.places["weight"].copy_(torch.from_numpy(worker).view(2, 3))
        buckets.fixed.add(0, False, None, False)
        buckets.fixed.end_pass()
        exact += np.rint(whole).astype(np.int64)
        expected += int(np.ceil(np.abs(whole).max()))
        if i % 64 in (0, (k - 1) % 64) and units.fits(expected, exponent):
            assert totals.tolist() == exact.tolist()
    assert totals.dtype == torch.int32 and not buckets.fixed.out_of_range
    assert buckets.scales.bounds[slot] == expected
    assert buckets.scales.overflow(buckets.scales.bounds.tolist()) == (["weight"] if expected > 2**31 - 1 else [])
    assert (expected > 2**31 - 1) == (share > 1)


@given(st.integers(1, 2**62), st.integers(-100, 100))
def test_the_next_unit_leaves_six_bits(bound, exponent):
    """S in its new unit is below 2^25 and, but for the last bit and the ends of the range, above 2^24."""
    following = units.next_exponent(bound, exponent)
    assert -100 <= following <= 100
    if -100 < following < 100:
        scaled = bound * Fraction(2) ** (following - exponent)
        assert 2**24 < scaled <= 2**25
    assert units.next_exponent(0, exponent) == exponent


def test_sums_in_c_are_torchs():
    """Tensors longer and shorter than what C does at a time, gradients of 1e-30 to 1e20, zeros, and at last a NaN."""
    made = torch.Generator().manual_seed(3)
    sizes = [(5,), (3000,), (1,), (32, 32), (0,), (7, 9), (2049,)]
    found = []
    for c in (False, True):
        made.manual_seed(3)
        parameters = [(f"p{i}", torch.nn.Parameter(torch.zeros(size))) for i, size in enumerate(sizes)]
        layouts = plan_layouts(parameters, {"p1", "p3"}, 12, 2**13, 2**13, narrow=True)
        buckets = Buckets(layouts, None, CPU, torch.float32, bits=40, int32=True)
        if not c:
            buckets.fixed.kernels = None
        elif not buckets.fixed.kernels:
            pytest.skip("the package's C part is not compiled: no C compiler when it was installed")
        fixed, seen = buckets.fixed, []
        for number in range(6):
            buckets.begin(3)
            for worker in range(3):
                for name, place in buckets.places:
                    size = 2.0 ** torch.randint(-4, 4, place.shape, generator=made) * 10.0 ** (int(name[1]) * 7 - 25)
                    place.copy_(torch.randn(place.shape, generator=made) * size * (number != int(name[1])))
                if number == 5 and worker == 1:
                    buckets.places[0][1].fill_(float("nan"))
                for bucket in buckets.buckets:
                    fixed.add(bucket.index, worker == 2, None, False)
                    assert worker == 2 or not bucket.gradients.any()
                fixed.end_pass()
            bounds = fixed.scales.bounds.tolist()
            overflow = fixed.scales.overflow(bounds)  # such a step is thrown away: its totals may be anything
            for bucket in buckets.buckets if number < 5 and not overflow else ():
                seen.append(fixed.sums(bucket.index).clone())
                fixed.take(bucket.index)
                seen.append(bucket.gradients.clone())
            seen += [fixed.out_of_range, fixed.scales.bounds.clone() if number < 5 else fixed.scales.bounds[1:].clone()]
            fixed.scales.settle(bounds if number < 5 else None, again=False)
        assert len(buckets.buckets) > 2 and seen[-2] and sum(s.dtype == torch.int32 for s in seen) > 5
        found.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "meta"])
def test_sums_in_c_do_not_follow_torchs_defaults(kind):
    """A model's code may set them, before or in mid-run. C writes where it is told to, in float32."""
    before, found = torch.get_default_dtype(), []
    for c in (False, True):
        buckets = buckets_of({"weight": 20, "one": 20})
        if not c:
            buckets.fixed.kernels = None
        elif not buckets.fixed.kernels:
            pytest.skip("the package's C part is not compiled: no C compiler when it was installed")
        try:
            torch.set_default_device(kind) if kind == "meta" else torch.set_default_dtype(kind)
            assert fixed_point.kernels_for(CPU, torch.float32) or not c
            scales = Scales([b.gradients for b in buckets.buckets], buckets.fixed.layouts, 40)
            assert [(e.dtype, e.device) for e in scales.ends] == [(torch.int64, CPU)]
            buckets.begin(2)
            for _, place in buckets.places:
                place.fill_(0.01)
            buckets.fixed.add(0, False, None, False)
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        found.append((buckets.scales.bounds.tolist(), buckets.fixed.sums(0).tolist()))
    assert found[0] == found[1] and found[0][0] == [10486, 10486]


def test_a_tensor_without_a_gradient_keeps_its_unit_through_a_step_in_int64():
    """Another tensor made it one: in int64's unit the next gradient of this one would be lost, or not be held."""
    buckets = buckets_of({"weight": 60, "one": -3})
    buckets.scales.again = True
    buckets.begin(2)
    buckets.buckets[0].places["one"].fill_(2.0**8)
    buckets.fixed.add(0, False, None, False)
    buckets.scales.settle(buckets.scales.bounds.tolist(), again=False)
    assert buckets.scales.exponents == {"weight": 60, "one": 25 - 8}
    buckets.begin(2)
    assert buckets.scales.narrow and buckets.scales._now == [17, 60]


def test_a_whole_step_after_a_tail_of_one_sample_is_held(engine):  # noqa: F811
    """The tail's sums are 1/128 of what the next step's are."""
    batch = {"workers": 128, "samples_per_worker": 1}
    recipe = small_recipe(
        determinism="any-ranks", fixed_point="int32", model={"name": "test_workers:plain_net"}, batch=batch
    )
    replica, taken = Replica(recipe, 5, engine, CPU), []
    for number, count in enumerate((128, 128, 1, 128, 1, 128)):
        point = Point(number, 0, number, 0.01, 0.9, 128, 1, 0, count)
        taken.append(step.Stepper(replica, recipe, batches(recipe, point, number)).run(point).finite)
    assert all(taken)


def test_a_sum_beyond_float32_is_not_taken():
    """int32 could hold it, in units of 2^100, and its value would be infinite."""
    buckets = buckets_of({"weight": -100, "one": -100})
    for workers, overflow in ((1, []), (2, ["weight"])):
        buckets.begin(workers)
        for _ in range(workers):
            buckets.buckets[0].places["weight"].fill_(2.0**126)
            buckets.fixed.add(0, False, None, False)
            buckets.fixed.end_pass()
        assert buckets.scales.overflow(buckets.scales.bounds.tolist()) == overflow


def test_halves_add_up_exactly():
    values = torch.tensor([2**62 - 1, 2**32 - 1, 5, 0])
    buckets = buckets_of({"weight": 0, "one": 0})
    many = (halves(values) * 4096).tolist()  # ranks
    assert [int(h) * 2**32 + int(low) for h, low in zip(*many, strict=True)] == [4096 * v for v in values.tolist()]
    assert buckets.scales.names == ["one", "weight"] and buckets.scales.length == 4  # an empty tensor has no unit


def run(replica, recipe, number, factor=1.0, seed=None, lr=0.1):
    """A step; factor: of its inputs."""
    point = point_of(number=number, lr=lr)
    made = [(x * factor, y, n) for x, y, n in batches(recipe, point, number if seed is None else seed)]
    return step.Stepper(replica, recipe, iter(made)).run(point)


def test_a_step_that_int32_cannot_hold_is_summed_in_int64(engine):  # noqa: F811
    """Inputs x 2^20: flagged by all, nothing moves, computed again in int64, and the next step is in int32 again."""
    recipe = small_recipe(determinism="any-ranks", fixed_point="int32", model={"name": "test_workers:plain_net"})
    replica = Replica(recipe, 5, engine, CPU)
    assert replica.exponents == {}
    assert run(replica, recipe, 0).finite and not replica.buckets.scales.narrow
    before, known = weights_sha256(replica.model), replica.exponents
    assert set(known) == {name for name, _ in replica.model.named_parameters()}
    outcome = run(replica, recipe, 1, 2.0**20, lr=1e-9)
    assert outcome.overflow and not outcome.finite and outcome.bad_ranks == 0
    assert weights_sha256(replica.model) == before and replica.exponents == known
    outcome = run(replica, recipe, 1, 2.0**20, lr=1e-9)
    assert outcome.finite and not outcome.overflow and weights_sha256(replica.model) != before
    assert all(replica.exponents[n] < known[n] for n in ("0.weight", "3.weight"))
    assert run(replica, recipe, 2, 2.0**20, lr=1e-9).finite and replica.buckets.scales.narrow


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_bad_step_is_not_tried_again_and_moves_no_unit(engine, poison):  # noqa: F811
    recipe = small_recipe(determinism="any-ranks", fixed_point="int32", model={"name": "test_workers:plain_net"})
    replica = Replica(recipe, 5, engine, CPU)
    assert run(replica, recipe, 0).finite and run(replica, recipe, 1).finite
    known, before = replica.exponents, weights_sha256(replica.model)
    outcome = run(replica, recipe, 2, poison)
    if poison == 1e30:  # finite, beyond int32's range, and int64's
        assert outcome.overflow
        outcome = run(replica, recipe, 2, poison)
    assert not outcome.finite and not outcome.overflow and outcome.bad_ranks == 1
    assert replica.exponents == known and weights_sha256(replica.model) == before
    assert run(replica, recipe, 2).finite and replica.buckets.scales.narrow


def test_a_gradient_that_was_zero_so_far_is_in_int64s_unit(engine):  # noqa: F811
    """zero_gamma: at step 0 whole branches have no gradient; what they get later is held, or computed again."""
    recipe = small_recipe(determinism="any-ranks", fixed_point="int32", fixed_point_bits=30)
    replica = Replica(recipe, 5, engine, CPU)
    run(replica, recipe, 0)
    unknown = {n for n, e in replica.exponents.items() if e == 30}
    assert any("conv" in n for n in unknown) and len(unknown) < len(replica.exponents)
    for number in (1, 1, 2, 2):
        run(replica, recipe, number)
    assert not any(replica.exponents[n] == 30 for n in unknown)


def test_int32_stays_near_int64(engine):  # noqa: F811
    """And is no int64 under another name: other bits, units finer than 2^-40 where gradients are small."""
    found = {}
    for kind in ("int64", "int32"):
        recipe = small_recipe(determinism="any-ranks", fixed_point=kind, model__zero_gamma=False)
        replica = Replica(recipe, 5, engine, CPU)
        outcomes = [run(replica, recipe, number, seed=0) for number in range(6)]
        assert all(o.finite for o in outcomes) and all(
            o.flushed is not None for o in outcomes[: 2 if kind == "int32" else 1]
        )
        found[kind] = replica
    a, b = (found[kind].model.state_dict() for kind in ("int64", "int32"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    sent = [found["int32"].buckets.fixed.sums(i) for i in range(len(found["int32"].buckets.buckets))]
    assert [t.dtype for t in sent] == [torch.int32] * (len(sent) - 1) + [torch.int64]  # statistics


class ByOrder:
    """An engine that matches sums by order."""

    rank, size, sums_gradients, named_sums = 0, 1, False, False

    def __init__(self):
        self.begun = []

    def start_sum(self, tensor, name):
        self.begun.append((name, tensor.dtype))


@pytest.mark.parametrize("narrow, dtype", [({"int32": True, "bits": 40}, torch.int32),
                                           ({"wire": (torch.bfloat16, 1.0)}, torch.bfloat16)])  # fmt: skip
def test_sums_in_few_bits_begin_while_backward_goes_on(narrow, dtype):
    """Statistics travel apart; on an engine that matches sums by order they must not hold up what is there before."""
    model, sums = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), ByOrder()
    layouts = plan_layouts(model.named_parameters(), set(), 16, 100, 100, narrow=True)
    buckets = Buckets(layouts, sums, CPU, torch.float32, **narrow)
    assert len(buckets.statistics) == 16
    if buckets.scales:
        buckets.scales.exponents = dict.fromkeys(buckets.scales.names, 20)
    buckets.begin(1)
    buckets.arm(last_pass=True)
    model(torch.randn(3, 8)).sum().backward()
    assert sums.begun == [(f"bucket.{i}", dtype) for i in range(len(layouts) - 1)]
    buckets.end_pass()
    assert sums.begun[len(layouts) - 1 :] == [
        (f"bucket.{len(layouts) - 1}", torch.int64 if buckets.fixed else torch.float32)
    ]


def test_a_plan_counts_bytes():
    found = [
        plan.demands(recipes.read("goyal-resnet50", settings), 1000, None, assumed=True)
        for settings in ([], ["determinism=any-ranks"], ["determinism=any-ranks", "fixed_point=int32"])
    ]
    off, wide, narrow = (d["required_gbit_per_s"] for d in found)
    assert wide == 2 * off and narrow == off


def test_what_int32_needs():
    for changes, says in ((["determinism=off"], "fixed_point = int32 with determinism = off"),
                          (["determinism=any-ranks", "precision=float64"], "with precision = float64")):  # fmt: skip
        with pytest.raises(RequestError, match=says):
            recipes.read("goyal-resnet50", ["fixed_point=int32", *changes])
