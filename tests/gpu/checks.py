"""The checks of gpu-check, in their order. Each returns (one sentence, values), raises AssertionError, or Skip where
the machine has no means for it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import torch
import yaml
from means import Skip

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.cluster import doctor as doctors
from hpc_lbsgd.data.dali import DaliLoader
from hpc_lbsgd.data.source import Source
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.parallel import fixed_point
from hpc_lbsgd.parallel.buckets import Buckets
from hpc_lbsgd.parallel.layout import plan_layouts
from hpc_lbsgd.train import step
from hpc_lbsgd.train.replica import weights_sha256

CPU = torch.device("cpu")
SMALL = {"name": "resnet8", "widths": [8, 8, 8], "zero_gamma": False}
LEVELS = 4.1  # of 255, between nvJPEG and libjpeg-turbo (docs/how-it-works.md)


def command(*words) -> str:
    """Standard output of hpc-lbsgd WORDS."""
    line = [sys.executable, "-m", "hpc_lbsgd.cli", *map(str, words)]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


# ---------------------------------------------------------------- machine and sums


def doctor(bench):
    wrong = [f for f in doctors.examine() if f.level == doctors.FAIL]
    assert not wrong, "; ".join(f"{f.what}: {f.found} -> {f.fix}" for f in wrong)
    return "no failure", {}


def driver(bench):
    if not bench.gpu:
        raise Skip("no GPU")
    p = torch.cuda.get_device_properties(bench.device)
    told = doctors.output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "?"
    facts = {"driver": told.splitlines()[0], "sm": f"{p.major}{p.minor}", "memory_gb": round(p.total_memory / 1e9, 1)}
    return f"{p.name}, driver {facts['driver']}, sm_{facts['sm']}, {facts['memory_gb']} GB", facts


def sums(bench):
    """By Horovod, of each type that travels; with one rank they are copies through NCCL."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32):
        x = torch.arange(1 << 16, device=bench.device).remainder(1000).to(dtype)
        expected = x * bench.engine.size
        bench.engine.wait(bench.engine.start_sum(x, f"sum.{dtype}"))
        assert torch.equal(x, expected), f"a sum of {dtype} is wrong"
    return "float32, float64, float16, int64, int32", {}


def kernels(bench):
    """Triton's against torch's operations, to the bit."""
    made = fixed_point.kernels_for(bench.device, torch.float32)
    if not bench.gpu:
        raise Skip("Triton's kernels are for GPUs; tests/gpu_less interprets them")
    assert made, "Triton makes no kernels here (see the warning): any-ranks works, in more passes over memory"
    layouts, found = plan_layouts(torch.nn.Linear(10**6, 7).named_parameters(), set(), 64, 2**40, 2**40), []
    for chosen in (None, made):
        buckets = Buckets(layouts, bench.engine, bench.device, torch.float32, bits=40)
        buckets.fixed.kernels = chosen
        buckets.begin(8)
        for last in (False, True):
            generator = torch.Generator(bench.device).manual_seed(int(last))
            buckets.arm(last)
            buckets.buckets[0].gradients.normal_(generator=generator)
            buckets.end_pass()
        buckets.finish()
        found.append((buckets.fixed.totals[0], buckets.buckets[0].gradients))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "they differ"
    return "equal to the bit, 7 million elements", {}


# ---------------------------------------------------------------- pixels and order


def pixels(bench):
    """DALI on the device against the same graph on the CPU, and against what CPUs train with."""
    data = recipes.Data(image_size=48, eval_resize=56, augment="resized-crop", mean=[0.0] * 3, std=[1.0] * 3)
    requests, values = [Request(1, np.arange(16)), Request(1, np.arange(16, 24))], {}
    for train in (True, False):
        found = []
        for device, whole in ((bench.device, True), (CPU, True), (CPU, False)):
            made = DaliLoader(Source(data, bench.photos, 3, train), 16, 2, 2, True, device, whole=whole)
            found.append(torch.cat([batch.inputs.cpu().contiguous().clone() for batch in made.batches(requests)]))
        for name, other in (("graph", found[1]), ("cpu", found[2])):
            gap = (found[0] - other).abs()
            for kind, value in (("worst", gap.max()), ("mean", gap.mean())):
                values[f"{name}_{kind}"] = max(values.get(f"{name}_{kind}", 0.0), float(value))
    told = "{graph_worst:.2f} of 255 levels from the CPU's decoder at most, {graph_mean:.3f} on average".format(
        **values
    )
    assert values["graph_worst"] <= LEVELS and values["graph_mean"] < 0.5, told
    return told, values


def order(bench):
    """Under a long queue: a sum waits for what it sums, and what follows a batch waits for its pixels."""
    for i in range(5):
        x = torch.zeros(1 << 20, device=bench.device)
        bench.busy()
        x += i + 1
        handle = bench.engine.start_sum(x, f"order.{i}")
        bench.engine.wait(handle)
        x *= 2
        assert x.eq(2 * (i + 1) * bench.engine.size).all(), "a sum did not wait for its summands"
    data = recipes.Data(image_size=64, augment="resized-crop")
    requests, seen = [Request(1, np.arange(8 * i, 8 * i + 8)) for i in range(4)], []
    for queue in (False, True):
        made, kept = DaliLoader(Source(data, bench.photos, 3, True), 8, 2, 2, True, bench.device), []
        for batch in made.batches(requests):
            if queue:
                bench.busy()
            kept.append(batch.inputs * 1)  # behind the queue; the batch goes back to DALI
            del batch
        seen.append(torch.cat(kept))
    assert torch.equal(*seen), "pixels were used before they were there, or after they were gone"
    return "5 sums and 4 batches behind a queue", {}


# ---------------------------------------------------------------- steps


def float64(bench):
    """ResNet-20 in float64, here against the CPU."""
    recipe = bench.recipe(SMALL | ({"name": "resnet20"} if bench.gpu else {}), 8, 2, size=16, precision="float64")
    found = [bench.train(recipe, 3, device)[0].model.state_dict() for device in (bench.device, CPU)]
    worst = max(
        float((a.cpu() - b).abs().max()) for a, b in zip(*(f.values() for f in found), strict=True) if a.numel()
    )
    assert worst < 1e-9, f"weights {worst:.1e} apart after 3 steps"
    return f"weights {worst:.1e} apart after 3 steps", {"worst": worst}


def one_hash(bench):
    """bf16 any-ranks: once more, and by torch's operations in place of our kernels."""
    base = {"precision": "bf16", "determinism": "any-ranks"}
    recipe = bench.recipe("resnet50", 32, 2, **base) if bench.gpu else bench.recipe(SMALL, 8, 2, 16, **base)

    def plain(stepper):
        stepper.replica.buckets.fixed.kernels = None

    ways = {"again": lambda stepper: None, "by torch's operations": plain}
    first = weights_sha256(bench.train(recipe, 4)[0].model)
    for way, settle in ways.items():
        assert weights_sha256(bench.train(recipe, 4, settle=settle)[0].model) == first, f"{way}: another hash"
    return f"{first[:12]}, 3 runs", {"sha256": first}


def late(bench):
    """Steps that the device takes or leaves by itself, against a host that reads each before its update."""

    def reads(late):
        return lambda stepper: setattr(stepper, "_late", late)

    hashes = {}
    for name, more in {"sgd": {}, "adam": {"optim": {"name": "adam"}}, "lars": {"optim": {"name": "lars"}}}.items():
        recipe = bench.recipe(SMALL, 8, 2, 16, determinism="any-ranks", **more)
        found = [bench.train(recipe, 6, settle=reads(late), bad=(1, 3))[0] for late in (True, False)]
        hashes[name] = weights_sha256(found[0].model)
        assert hashes[name] == weights_sha256(found[1].model), f"{name}: other weights than read at once"
        for kind, flats in found[0].optimizer.flats.items():
            alike = map(torch.equal, flats, found[1].optimizer.flats[kind])
            assert all(alike), f"{name}: another {kind} than read at once"
    return "4 steps of 6, 2 not finite", hashes


def passes_and_wire(bench):
    """k = 4 in 4 passes and in 1, and gradients in float16: finite, and close."""
    many = bench.recipe("resnet50", 16, 4) if bench.gpu else bench.recipe(SMALL, 8, 4, 16)
    whole = many.model_copy(update={"machine": many.machine.model_copy(update={"workers_per_pass": 4})})
    losses = []
    for recipe in (many, whole, many.model_copy(update={"wire": "fp16"})):
        schedule, replica = recipe.build_schedule(10**4), bench.replica(recipe)
        batches = list(bench.noise(many, 1, bench.device, replica))
        if recipe is whole:
            batches = [(torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]), 0)]
        losses.append(
            step.Stepper(replica, recipe, iter(batches)).run(schedule.at(1)).loss
        )  # step 0 is measured, a worker a pass
    assert all(map(math.isfinite, losses)) and max(losses) - min(losses) < 1e-2, f"losses {losses}"
    return f"losses within {max(losses) - min(losses):.1e}", {"losses": losses}


def stop_and_resume(bench):
    """By the command, eager and, on GPUs, compiled: 6 steps at once, and 3 and 3."""
    seen = {}
    for compiled in ("none", "stages") if bench.gpu else ("none",):
        recipe = bench.recipe(SMALL, 8, 2, 16, determinism="any-ranks").model_dump(mode="json")
        recipe["data"] |= {"train": str(bench.photos.path), "augment": "resized-crop", "samples": None, "classes": None}
        recipe["machine"]["compile"], recipe["train"]["preflight"] = compiled, False
        path = bench.folder / f"{compiled}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        hashes = []
        for name, legs in (("whole", [6]), ("parts", [3, 6])):
            run = bench.folder / f"{compiled}-{name}"
            for i, steps in enumerate(legs):
                more = ["--resume"] if i else []
                command("train", path, "--run", run, "--set", f"train.max_steps={steps}", *more)
            hashes.append(json.loads((run / "status.json").read_text())["weights_sha256"])
        assert hashes[0] == hashes[1], f"compile {compiled}: other weights after a resume"
        seen[compiled] = hashes[0]
    return ", ".join(f"compile {way}: {digest[:12]}" for way, digest in seen.items()), seen


def host_waits(bench):
    """Steps wait for the control vector alone, by an event, which torch's debug mode does not count."""
    if not bench.gpu:
        import gpu_model

        reads = len(gpu_model.count(gpu_model.resnet50(8)).reads)
        assert reads == 1, f"{reads} reads a step"
        return "1 a step (counted on meta)", {"reads": reads}
    recipe = bench.recipe("resnet50", 32, 1, precision="bf16")
    replica, schedule = bench.replica(recipe), recipe.build_schedule(10**4)
    stepper = step.Stepper(replica, recipe, iter(list(bench.noise(recipe, 4, bench.device, replica))))
    outcomes = stepper.outcomes(map(schedule.at, range(4)))
    for _ in range(2):
        next(outcomes)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            next(outcomes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in said if "synchroniz" in str(w.message)]
    assert not waits, f"{len(waits)} more waits a step: {', '.join(waits[:5])}"
    return "none but for the control vector", {"waits": waits}


def profile(bench):
    """Where the device stands still, at batch 256 and 32."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    values = {}
    for n in (256, 32) if bench.gpu else (8,):
        recipe = bench.recipe("resnet50", n, 1, precision="bf16") if bench.gpu else bench.recipe(SMALL, n, 1, 16)
        replica, schedule = bench.replica(recipe), recipe.build_schedule(10**5)
        stepper = step.Stepper(replica, recipe, iter(list(bench.noise(recipe, 1, bench.device, replica)) * 9))
        outcomes = stepper.outcomes(map(schedule.at, range(8)))
        for _ in range(4):
            next(outcomes)
        with profiler(activities=[ProfilerActivity.CUDA if bench.gpu else ProfilerActivity.CPU]) as prof:
            for _ in range(3):
                next(outcomes)
            bench.wait()
        device = torch.autograd.DeviceType.CUDA if bench.gpu else torch.autograd.DeviceType.CPU
        events = sorted((e.time_range.start, e.time_range.end) for e in prof.events() if e.device_type == device)
        last, gaps = events[0][0], []
        for start, end in events:
            if start > last:
                gaps.append(start - last)
            last = max(last, end)
        span = last - events[0][0]
        gaps.sort(reverse=True)
        values[str(n)] = {"ms_a_step": span / 3e3, "idle_share": sum(gaps) / span, "launches": len(events) // 3,
                          "longest_gaps_us": gaps[:10]}  # fmt: skip
    found = (f"n = {n}: idle {v['idle_share']:.0%} of {v['ms_a_step']:.1f} ms" for n, v in values.items())
    return "; ".join(found), values


def rates(bench):
    """Products and copies of this device, and images/s of a step against what they allow."""

    def seconds(call, times=10):
        call()
        bench.wait()
        started = time.perf_counter()
        for _ in range(times):
            call()
        bench.wait()
        return (time.perf_counter() - started) / times

    side, words = (8192, 1 << 28) if bench.gpu else (256, 1 << 20)
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    x, y = torch.zeros(words, device=bench.device), torch.zeros(words, device=bench.device)
    flops, bandwidth = 2 * side**3 / seconds(lambda: a @ a), 8 * words / seconds(lambda: y.copy_(x))
    values = {"bf16_tflops": flops / 1e12, "copy_gb_per_s": bandwidth / 1e9}
    for n in (256, 32) if bench.gpu else ():
        _, took = bench.train(bench.recipe("resnet50", n, 1, precision="bf16"), 8)
        values[f"images_per_s_{n}"] = n / took
        import gpu_model

        cost = gpu_model.count(gpu_model.resnet50(n, precision="bf16"))
        # 3 x 4.1 billion multiplications and additions an image (He et al. 2015)
        values[f"of_roofline_{n}"] = max(cost.bytes / bandwidth, n * 3 * 2 * 4.1e9 / flops) / took
    return ", ".join(f"{key} {value:.3g}" for key, value in values.items()), values


# ---------------------------------------------------------------- more means


def sanitizer(bench):
    if not bench.gpu or not shutil.which("compute-sanitizer"):
        raise Skip("no compute-sanitizer on PATH" if bench.gpu else "no GPU")
    code = (
        "import torch; from hpc_lbsgd.parallel import kernels as k; d = 'cuda'; n = 10007\n"
        "g, t = torch.randn(n, device=d), torch.zeros(n, dtype=torch.int64, device=d)\n"
        "k.add(g, t, torch.zeros((), dtype=torch.bool, device=d), 5, 2.**40, 2.**40, 2.**61, True, True)\n"
        "k.take(t, g, 5, 2.**-40, 2.**-40); torch.cuda.synchronize()"
    )
    result = subprocess.run(["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-c", code],
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:]
    return "no error in our kernels", {}


def ranks(bench):
    """One hash on 1, 2, 4 and 8 GPUs."""
    count = torch.cuda.device_count()
    if count < 2:
        raise Skip("one GPU" if count else "no GPU")
    recipe = bench.recipe("resnet50", 16, 8, 96, determinism="any-ranks", precision="bf16").model_dump(mode="json")
    recipe["data"] |= {"train": str(bench.photos.path), "augment": "resized-crop", "samples": None, "classes": None}
    path, hashes = bench.folder / "ranks.yaml", {}
    path.write_text(yaml.safe_dump(recipe))
    for np_ in (n for n in (1, 2, 4, 8) if n <= count):
        run = bench.folder / f"on-{np_}"
        command("launch", "--np", np_, "--", "train", path, "--run", run, "--set", "train.max_steps=5")
        hashes[np_] = json.loads((run / "status.json").read_text())["weights_sha256"]
    assert len(set(hashes.values())) == 1, f"{hashes}"
    return f"{hashes[1][:12]} on {', '.join(map(str, hashes))}", {"sha256": hashes[1]}


def bandwidth(bench):
    """NCCL over all GPUs of this node, through Horovod."""
    count = torch.cuda.device_count()
    if count < 2:
        raise Skip("one GPU" if count else "no GPU")
    rows = json.loads(command("bench", "allreduce", "--ranks", count, "--bytes", "4MB,64MB", "--json"))["rows"]
    best = max(rows, key=lambda row: row["busbw_bytes_per_s"])
    return f"{best['busbw_bytes_per_s'] / 1e9:.0f} GB/s by {best['algorithm']}", {"rows": rows}


ALL = [
    doctor,
    driver,
    sums,
    kernels,
    pixels,
    order,
    float64,
    one_hash,
    late,
    passes_and_wire,
    stop_and_resume,
    host_waits,
    profile,
    rates,
    sanitizer,
    ranks,
    bandwidth,
]
