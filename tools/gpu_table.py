#!/usr/bin/env python3
# ruff: noqa: E501  (rows of tables)
"""Print docs/results/gpu-model.md: what a step costs by calculation, before and after the changes of its kernels and
waits. Nothing in it was measured.

python tools/gpu_table.py > docs/results/gpu-model.md
"""

from __future__ import annotations

import gpu_model

# An H100 SXM, and what of it is reached
BYTES_PER_S = 0.85 * 3.35e12
FLOP_PER_S = 0.50 * 989e12
FLOP_PER_IMAGE = 3 * 2 * 4.1e9  # forward and twice as much backward (He et al. 2015: 4.1e9 products of ResNet-50)
HOST_S_PER_LAUNCH = 8e-6  # eager torch, autograd included
HOST_S_PER_KERNEL = 4e-6  # from compiled code, which has neither dispatcher nor autograd on the way
COPY_BYTES_PER_S = 10e9  # one core, from memory to memory
JPEG_BYTES = 110e3  # of an ImageNet photograph
CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")

HEAD = """# A step on a GPU, calculated

***Calculated, not measured***: no GPU was at hand. `python tools/gpu_table.py` counts a whole training step of
ResNet-50 (bf16, channels last, `bn_group: 32`) on torch's `meta` device with `tools/gpu_model.py`, which
`tests/gpu_less` runs too: operations launched, and bytes that they read and write if nothing stays in a cache. What is
compiled (`machine.compile: stages`, the default on GPUs) is counted on the graphs that torch's compiler is given, cut
into kernels by its rule (`tools/gpu_fused.py`). From there to milliseconds of an H100 SXM:

| taken as given | |
|---|---|
| memory | 0.85 of 3.35 TB/s |
| convolutions | the longer of their bytes and 24.6 GFLOP an image at 0.50 of 989 TFLOP/s |
| launching | 8 us of the host an operation, 4 us a kernel of compiled code that is no product; the device waits where that is longer than its own work |
| waits | bytes of JPEGs copied into DALI at 10 GB/s (110 kB each); 1 ms for windows and labels; half a cycle of Horovod |
| sums over ranks | hidden behind backward, but for the wait for the last |
| what the host launches from the last sum to the end of the update, where it waited for the sum | 8 us an operation, in which the device has nothing else to do |

Before: torch's operations for fixed point and SGD, batches fetched when the sums were there, 1 ms cycles, and the host
reads whether a step may be taken before it launches the update. After: a Triton kernel each way, the fused update,
batches fetched while sums are under way and taken where DALI made them, 0.25 ms cycles, up to 0.1 ms of sleep; the
device decides whether a step is taken, and the host reads it when the next step's backward is launched. Horovod still
tells the host, not the device, that a sum is there: what follows the last one is launched when it is. torch.distributed
(`machine.engine: torch`) makes the device's stream wait, and the host goes on.

| determinism | n | | launches | GB | device ms | host ms | exposed waits ms | step ms | images/s |
|---|---|---|---|---|---|---|---|---|---|
"""

TAIL = """
What it says, if it is right: at n = 256 the device is the limit, and the wait for the next batch was the largest loss;
at n = 32 the host is. `make gpu-check` measures each of these columns: rates, idle share, launches, gaps.

## What is left

| | calculated |
|---|---|
| eager, `bn_group: 32` at n = 256: {cat:.1f} GB of {all:.1f} put 8 groups' outputs and gradients together again, and BatchNorm takes {norms:,} of {launches} launches. Compiled, a layer's groups are one reduction over (G, n, C, H, W), and neither is there; in eager torch it would make 10 passes of the backward's 5 | {cat_ms:.1f} ms |
| through Horovod the host waits for the last sum, and launches the update ({behind} operations) with an idle device; not with `machine.engine: torch` | {behind_ms:.2f} ms a step |
| LARS, Adam and `form: v` have no kernel that skips by itself: a part of the weights and its state is copied, updated, and chosen from | 5 passes over each tensor |
| `fixed_point: int32` and optimizers of `torch.optim` or your own are read at once, for the next step's units and the optimizer's own numbers follow from it; so are steps that are measured or compared, and the last before an evaluation | as much in such a step, through any engine |
| n = 32, compiled: {few} launches take the host {host:.1f} ms, the device has {device:.1f} ms of work. CUDA graphs cut at bucket ends would launch less; gradient hooks are Python and do not run in a replay, so that each cut waits for its sum | nothing, while the device is the longer |
| gradients are added into zeroed buckets, a launch a parameter | 161 launches, 0.9 GB |
"""


def seconds(seen: gpu_model.Seen, n: int) -> tuple[float, float]:
    """(device, host) of a step."""
    convolutions = sum(seen.costs[name].bytes for name in CONVOLUTIONS)
    device = (seen.bytes - convolutions) / BYTES_PER_S
    device += max(convolutions / BYTES_PER_S, n * FLOP_PER_IMAGE / FLOP_PER_S)
    made = seen.costs["aten::compiled"].launches if "aten::compiled" in seen.costs else 0
    return device, (seen.launches - made) * HOST_S_PER_LAUNCH + made * HOST_S_PER_KERNEL


def waits(n: int, way: str) -> float:
    """Seconds in which the device has nothing to do, because the host waits or fetches."""
    if way == "torch":
        return 0.0
    if way == "before":
        return n * JPEG_BYTES / COPY_BYTES_PER_S + 1e-3 + 0.5e-3
    return 0.125e-3 + 0.1e-3


def launches_behind(seen: gpu_model.Seen) -> int:
    """From the last sum to the end of the update."""
    return seen.at["updated"] - seen.at["summed"]


def behind(seen: gpu_model.Seen) -> float:
    """Seconds of the host for them."""
    return launches_behind(seen) * HOST_S_PER_LAUNCH


def main() -> None:
    print(HEAD, end="")
    kept = {}
    for determinism in ("off", "any-ranks"):
        for n in (256, 32):
            for way in ("before", "horovod", "torch", "horovod, compiled"):
                how = "stages" if "compiled" in way else "none"
                recipe = gpu_model.resnet50(n, determinism=determinism, precision="bf16", machine__compile=how)
                seen = kept[determinism, n, way] = gpu_model.count(recipe, plain=way == "before")
                device, host = seconds(seen, n)
                exposed, idle = waits(n, way), 0.0 if way == "torch" else behind(seen)
                took = max(device + idle, host) + exposed
                named = "before" if way == "before" else f"after, {way}"
                cells = (determinism, n, named, f"{seen.launches:,}", f"{seen.bytes / 1e9:.1f}")
                times = (f"{1e3 * t:.1f}" for t in (device, host, exposed, took))
                print(f"| {' | '.join(map(str, (*cells, *times, f'{n / took:,.0f}')))} |")
    large, small = kept["off", 256, "horovod"], kept["off", 32, "horovod, compiled"]
    norms = sum(cost.launches for name, cost in large.costs.items() if "batch_norm" in name)
    cat, (device, host) = large.costs["aten::cat"].bytes, seconds(small, 32)
    facts = {"cat": cat / 1e9, "all": large.bytes / 1e9, "norms": norms, "launches": f"{large.launches:,}"}
    facts |= {"cat_ms": 1e3 * cat / BYTES_PER_S, "few": small.launches}
    facts |= {"behind": launches_behind(small), "behind_ms": 1e3 * behind(small)}
    print(TAIL.format(**facts, host=1e3 * host, device=1e3 * device), end="")


if __name__ == "__main__":
    main()
