"""An all-reduce of int64 beside its middle way: reduce-scatter in int64, rounding to float32, all-gather of that.

    mpirun -np 2 python tools/reduce_scatter_costs.py horovod
    torchrun --nproc-per-node 2 tools/reduce_scatter_costs.py gloo

Both end in the same float32; the middle way sends three quarters of the bytes, in two collectives. In turn, 36 times.
"""

from __future__ import annotations

import argparse
import time
from statistics import quantiles

import torch

UNIT, ROUNDS, WARM_UPS = 2.0**-40, 40, 4
SIZES = (1 << 13, 1 << 16, 1 << 19, 1 << 22)  # elements


class Horovod:
    def __init__(self):
        import horovod.torch as hvd

        hvd.init()
        self.hvd, self.rank, self.size, self.barrier = hvd, hvd.rank(), hvd.size(), hvd.barrier

    def whole(self, x):
        return self.hvd.allreduce(x, op=self.hvd.Sum, name="whole")

    def scattered(self, x):
        return self.hvd.reducescatter(x, op=self.hvd.Sum, name="scattered")

    def gathered(self, part):
        return self.hvd.allgather(part, name="gathered")


class Gloo:
    def __init__(self):
        import torch.distributed as dist  # noqa: TID251  (it is what is measured)

        dist.init_process_group("gloo")
        self.dist, self.rank, self.size, self.barrier = dist, dist.get_rank(), dist.get_world_size(), dist.barrier

    def whole(self, x):
        self.dist.all_reduce(x)
        return x

    def scattered(self, x):
        part = torch.empty(len(x) // self.size, dtype=x.dtype)
        self.dist.reduce_scatter_tensor(part, x)
        return part

    def gathered(self, part):
        out = torch.empty(len(part) * self.size)
        self.dist.all_gather_into_tensor(out, part)
        return out


ENGINES = {"horovod": Horovod, "gloo": Gloo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    engine = ENGINES[parser.parse_args().engine]()
    torch.set_num_threads(1)
    ways = {
        "all-reduce": lambda x: (engine.whole(x) * UNIT).float(),
        "middle way": lambda x: engine.gathered((engine.scattered(x) * UNIT).float()),
    }
    for elements in SIZES:
        x = torch.randint(-(2**50), 2**50, (elements,))
        results = [way(x.clone()) for way in ways.values()]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                copy = x.clone()
                engine.barrier()
                before = time.perf_counter()
                way(copy)
                times[name].append(1e3 * (time.perf_counter() - before))
        if engine.rank == 0:
            said = "  ".join(f"{n} {q[1]:.2f} ({q[0]:.2f} - {q[2]:.2f}) ms" for n, t in times.items()
                             for q in [quantiles(t[WARM_UPS:], n=4)])  # fmt: skip
            print(f"{8 * elements / 1e6:8.2f} MB  {said}  same bits: {torch.equal(*results)}", flush=True)


if __name__ == "__main__":
    main()
