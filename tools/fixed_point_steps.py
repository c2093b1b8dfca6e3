"""Steps of one model with float32, int64 and int32 sums, in turn in the same ranks.

mpirun -np 2 python tools/fixed_point_steps.py [--model resnet20] [--image-size 32] [--batch 8] [--rounds 30]

`bench step` launches its ways one after another, which a machine that others use in between makes hard to compare. Here
each round is a step of each way. Times are of the slowest rank; processor seconds are those of all threads of all
ranks, and do not hold what others make them wait for. Over off: the median of each round's own ratio.
"""

from __future__ import annotations

import argparse
import time
from itertools import repeat
from statistics import median, quantiles

import torch

from hpc_lbsgd.bench.core.task import CLASSES, recipe_of
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.parallel import engine as engines
from hpc_lbsgd.parallel.memory import keep_freed_memory
from hpc_lbsgd.theory.schedule import Point
from hpc_lbsgd.train.replica import Replica
from hpc_lbsgd.train.step import Stepper

WAYS = {"float32 (off)": "buckets", "int64": "any-ranks", "int32": "any-ranks int32"}
WAYS |= {f"{way}, torch alone": WAYS[way] for way in ("int64", "int32")}  # without cpu_kernels.c
WARM_UPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="as a recipe's model.name")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="samples a rank")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each way that are timed")
    args = parser.parse_args()
    keep_freed_memory()  # as ranks of `train` do
    torch.set_num_threads(1)
    task = {"model": args.model, "image_size": args.image_size, "precision": "float32"}
    device = torch.device("cpu")
    engine = engines.create(recipe_of(task | {"mode": "buckets"}, 1, args.batch).machine, "off", device)
    torch.manual_seed(engine.rank)
    shape = (args.batch, 3, args.image_size, args.image_size)
    batch = Batch(torch.randn(shape), torch.randint(0, CLASSES, (args.batch,)))
    steppers = {}
    for way, mode in WAYS.items():
        recipe = recipe_of(task | {"mode": mode}, engine.size, args.batch)
        replica = Replica(recipe, CLASSES, engine, device)
        replica.synchronise()
        if way.endswith("torch alone"):
            replica.buckets.fixed.kernels = None
        steppers[way] = Stepper(replica, recipe, repeat(batch))
    kn = engine.size * args.batch
    times = {way: [] for way in WAYS}
    for number in range(WARM_UPS + args.rounds):
        point = Point(number, 0, number, 1e-3, 0.9, engine.size, args.batch, 0, kn)
        for way, stepper in steppers.items():
            engine.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            outcome = stepper.run(point)
            found = engine.gather((time.perf_counter() - start, time.process_time() - cpu))
            if number >= WARM_UPS and outcome.finite:
                times[way].append((max(t for t, _ in found), sum(c for _, c in found)))
    if engine.rank == 0:
        print(f"{args.model}, {args.batch} samples a rank, {engine.size} ranks, {args.rounds} rounds; milliseconds")
        print(f"{'':20}{'MB sent':>9}{'median':>9}{'quartiles':>17}{'processor':>11}{'quartiles':>17}{'over off':>10}")
        off = [clock for clock, _ in times["float32 (off)"]]
        for way, found in times.items():
            over = median(clock / its for (clock, _), its in zip(found, off, strict=True))
            buckets = steppers[way].replica.buckets
            sent = buckets.fixed.sums if buckets.fixed else lambda i, b=buckets: b.buckets[i].gradients
            megabytes = sum(sent(i).nbytes for i in range(len(buckets.buckets))) / 1e6
            columns = ""
            for values in zip(*found, strict=True):
                low, _, high = quantiles(values)
                columns += f"{median(values) * 1e3:10.1f}{f'{low * 1e3:.1f} - {high * 1e3:.1f}':>17}"
            print(f"{way:20}{megabytes:9.2f}{columns}{over:10.3f}")
    engine.close()


if __name__ == "__main__":
    main()
