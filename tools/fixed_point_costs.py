"""How far sums of gradients over workers are from exact ones, and what they take: int64, int32 and float32.

python tools/fixed_point_costs.py [--workers 256] [--elements 100000]

Gradients are normal, their sizes log-uniform over four decades inside one tensor. int32 has the unit that follows from
a step before, of the same sizes. Errors are relative: the root mean square of the error over that of the sums (norm);
of each element, its median; and norm over the elements of the smallest decade alone. Costs are processor seconds of one
thread, the fastest of several times, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import time
from itertools import product

import torch

from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.parallel.memory import keep_freed_memory

DECADES = 4


def gradients(workers: int, sizes: torch.Tensor, signal: float, seed: int):
    """float32 (elements,) of each worker: noise of its own, and `signal` times as much that all share."""
    made = torch.Generator().manual_seed(seed)
    shared = torch.randn(len(sizes), generator=made) * signal
    for _ in range(workers):
        yield sizes * (shared + torch.randn(len(sizes), generator=made)) / workers


class Sums:
    """The package's own buckets on one rank, around a tensor."""

    def __init__(self, elements: int, int32: bool):
        tensor = torch.nn.Parameter(torch.zeros(elements))
        layouts = plan_layouts([("tensor", tensor)], set(), 0, 2**40, 2**40, narrow=int32)
        self.buckets = Buckets(layouts, None, torch.device("cpu"), torch.float32, bits=40, int32=int32)
        self.place = self.buckets.buckets[0].places["tensor"]

    def of(self, workers: int, values) -> tuple[torch.Tensor, float]:
        """The sums, and the share of values that rounding made zero."""
        fixed = self.buckets.fixed
        self.buckets.begin(workers, count_flushed=True)
        for value in values:
            self.place.copy_(value)
            fixed.add(0, False, None, False)
            fixed.end_pass()
        fixed.take(0)
        if fixed.scales:
            bounds = fixed.scales.bounds.tolist()
            assert not fixed.scales.overflow(bounds) and not fixed.out_of_range
            fixed.scales.settle(bounds, again=False)
        before, lost = self.buckets.flushed.tolist()
        return self.place.double().clone(), lost / before


def row(found: torch.Tensor, exact: torch.Tensor, smallest: torch.Tensor) -> str:
    error = found - exact
    of_each = error / exact
    norm = (error.square().mean() / exact.square().mean()).sqrt()
    small = (error[smallest].square().mean() / exact[smallest].square().mean()).sqrt()
    return f"{norm:11.1e} {of_each.abs().median():11.1e} {small:11.1e}"


def cost(kind: str, elements: int, c: bool, rounds: int = 9) -> str:
    """Of a step with one worker on this rank, of a worker more, and bytes on the wire. c: by cpu_kernels.c."""
    sums = Sums(elements, kind == "int32")
    if not c:
        sums.buckets.fixed.kernels = None
    values = torch.randn(elements) * 1e-3
    sums.of(1, [values])
    fixed, times = sums.buckets.fixed, {"one": [], "more": []}
    for _ in range(rounds):
        fixed.begin(2, None)
        for what, first in (("one", True), ("more", False)):
            sums.place.copy_(values)
            start = time.process_time()
            fixed.add(0, True, None, False)
            if first:
                fixed.end_pass()
                fixed.take(0)
            times[what].append(time.process_time() - start)
    one, more = (min(t) / elements * 1e9 for t in times.values())
    title = kind if c else f"{kind}, torch alone"
    return f"  {title:24}{one:11.2f} {more:11.2f} {fixed.sums(0).element_size():11d}"


def compiled_cost(elements: int, rounds: int = 9) -> str:
    """Of int64's rounding by torch.compile, without the way back: the first worker on this rank, and each more."""

    @torch.compile(dynamic=False, fullgraph=True)
    def add(flat, totals, first: bool):
        whole = (flat * 2.0**40).round()
        bad = (~(whole.abs() <= 2.0**61)).any()
        totals.copy_(whole.to(torch.int64) if first else totals + whole.to(torch.int64))
        return bad

    values, totals = torch.randn(elements) * 1e-3, torch.zeros(elements, dtype=torch.int64)
    times = {first: [] for first in (True, False)}
    for _ in range(rounds + 1):
        for first, found in times.items():
            start = time.process_time()
            add(values, totals, first)
            found.append(time.process_time() - start)
    one, more = (min(found[1:]) / elements * 1e9 for found in times.values())
    return f"  {'int64, torch.compile':24}{one:11.2f} {more:11.2f} {8:11d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=256, help="k")
    parser.add_argument("--elements", type=int, default=100_000, help="of the tensor")
    args = parser.parse_args()
    keep_freed_memory()  # as ranks of `train` do
    torch.set_num_threads(1)
    k = args.workers
    made = torch.Generator().manual_seed(1)
    sizes = 10.0 ** (-1 - DECADES * torch.rand(args.elements, generator=made))
    smallest = sizes < 10.0**-(DECADES)
    print(f"{'k = ' + str(k):26}{'norm':>11} {'median':>11} {'smallest':>11} {'flushed':>9}")
    for signal in (0.0, 1.0):
        exact = sum(g.double() for g in gradients(k, sizes, signal, 2))
        plain = torch.zeros(args.elements)
        for g in gradients(k, sizes, signal, 2):
            plain += g
        title = "noise alone" if not signal else "signal as large as noise"
        print(f"{title}\n  {'float32':24}{row(plain.double(), exact, smallest)}")
        for kind in ("int64", "int32"):
            sums = Sums(args.elements, kind == "int32")
            sums.of(k, gradients(k, sizes, signal, 3))
            found, lost = sums.of(k, gradients(k, sizes, signal, 2))
            print(f"  {kind:24}{row(found, exact, smallest)} {lost:9.3%}")
    for elements in (10_000_000, 70_000):
        print(f"\n{'ns an element of ' + f'{elements:,}':26}{'step':>11} {'worker more':>11} {'bytes':>11}")
        for kind, c in product(("int64", "int32"), (True, False)):
            print(cost(kind, elements, c))
        print(compiled_cost(elements))


if __name__ == "__main__":
    main()
