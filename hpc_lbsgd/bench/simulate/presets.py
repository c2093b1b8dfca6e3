"""Systems that were published, as the simulator takes them: every number with where it comes from.

Only STRAGGLER and PROTOCOL_EFFICIENCY are fitted, once, to the five points of PUBLISHED that say so; all presets share
them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from hpc_lbsgd.bench.simulate.workload import stored
from hpc_lbsgd.theory.simulate import Cluster, Fitted, Method, Protocol, System, Workload

GBIT, GB, MB, US, MS = 1e9 / 8, 1e9, 2.0**20, 1e-6, 1e-3

STRAGGLER, PROTOCOL_EFFICIENCY = 0.046, 0.78

# by the link inside a node: simple, and the low-latency protocol, which sends a flag with every four bytes
PROTOCOLS = {
    "NVLink": (Protocol(14.0 * US, 3.4 * US), Protocol(2.7 * US, 0.6 * US, 0.5)),
    "PCI": (Protocol(14.0 * US, 5.7 * US), Protocol(2.7 * US, 1.0 * US, 0.5)),
}
LATENCY = {
    link: "NCCL 2.18, src/graph/tuning.cc, ring, us a hop: "
    + "; ".join(
        f"{name} {p.inter_latency_s / US:g} network, {p.intra_latency_s / US:g} {link}"
        for name, p in zip(("simple", "low-latency (half the bandwidth)"), protocols, strict=True)
    )
    for link, protocols in PROTOCOLS.items()
}
THIRDS = "backward twice the forward (two of the three multiplications of each layer)"


class Preset(NamedTuple):
    system: System
    baseline_ranks: int  # of the efficiency that its source states
    title: str
    sources: dict[str, str]  # by field: where the number comes from


def of_batch(system: System, samples: int, images_per_s: float | None = None) -> System:
    """The same system with so many samples a rank; at the same rate, or at this one."""
    work = system.workload
    longer = samples / images_per_s / work.compute_s if images_per_s else samples / work.samples
    times = {key: getattr(work, key) * longer for key in ("forward_s", "backward_s", "other_s")}
    return replace(system, workload=replace(work, samples=samples, **times))


def thirds(model: str, samples: int, images_per_s: float) -> Workload:
    """A step at a GPU's measured rate, a third of it forward."""
    compute = samples / images_per_s
    return Workload(stored()[model], samples, compute / 3, 2 * compute / 3)


def fitted(straggler: float = STRAGGLER, efficiency: float = PROTOCOL_EFFICIENCY) -> Fitted:
    return Fitted(straggler, efficiency)


def goyal() -> Preset:
    # 29 h for 90 epochs of 1,281,167 / 256 steps: 0.232 s a step on one server
    step_s, backward_s = 29 * 3600 / (90 * 1_281_167 / 256), 0.120
    forward_s = backward_s / 2
    return Preset(
        System(
            Workload(stored()["resnet50"], 32, forward_s, backward_s, step_s - forward_s - backward_s),
            Cluster(8, 50 * GBIT, 80 * GB, PROTOCOLS["NVLink"]),
            Method("hierarchical"),
            fitted(),
        ),
        8,
        "ResNet-50, n = 32, 8 P100 a server, 50 Gbit/s Ethernet",
        {
            "forward_s": THIRDS,
            "backward_s": "Goyal et al. 2017, section 4: 120 ms",
            "other_s": "the rest of a step on one server, Goyal et al. 2017: 29 h for 90 epochs on 8 P100",
            "inter": "Goyal et al. 2017, section 4: 50 Gbit/s Ethernet",
            "intra": "P100 data sheet: NVLink, 4 links of 20 GB/s and direction",
            "protocols": LATENCY["NVLink"],
            "method": "Goyal et al. 2017, section 4: three phases, halving-doubling between servers, each gradient as "
            "soon as it is there",
        },
    )


def horovod(model: str, images_per_s: float) -> Preset:
    return Preset(
        System(
            thirds(model, 64, images_per_s),
            Cluster(4, 25 * GBIT, 15.75 * GB, PROTOCOLS["PCI"]),
            Method("ring", fusion_bytes=64 * MB, cycle_s=5 * MS),
            fitted(),
        ),
        1,
        f"{model}, n = 64, 4 Pascal GPUs a server, 25 Gbit/s RoCE",
        {
            "forward_s": f"a third of 64 / ({images_per_s:g} images/s), one GPU: Horovod pull request 44",
            "backward_s": THIRDS,
            "inter": "Horovod, docs/benchmarks: 25 Gbit/s RoCE",
            "intra": "PCI Express 3.0 x16, 15.75 GB/s (assumed: the link inside a server is not published)",
            "protocols": LATENCY["PCI"],
            "method": "NCCL ring; fusion 64 MB, cycle 5 ms: Horovod's defaults before 0.21",
        },
    )


def modern(
    gpu: str, images_per_s: float, rate: str, network_gbit: float, network: str, nvlink_gb: float, links: str
) -> Preset:
    return Preset(
        System(
            thirds("resnet50", 256, images_per_s),
            Cluster(8, network_gbit * GBIT, nvlink_gb * GB, PROTOCOLS["NVLink"]),
            Method("nccl", 25 * MB, 1 * MB, cycle_s=1 * MS),
            fitted(),
        ),
        8,
        f"ResNet-50, n = 256, 8 {gpu} a node, {network}",
        {
            "forward_s": f"a third of 256 / ({images_per_s:g} images/s), one GPU: {rate}",
            "backward_s": THIRDS,
            "inter": f"{network}, {network_gbit:g} Gbit/s a node",
            "intra": links,
            "protocols": LATENCY["NVLink"],
            "method": "NCCL, ring or tree by message; our defaults: buckets of 25 MB, first 1 MB, cycle 1 ms, float32",
        },
    )


def mlperf() -> Preset:
    rate = 57_295 / 8
    preset = modern(
        "H100", rate, "MLPerf Training 4.0, 57,295 images/s on 8 H100 (their sums included)", 3200,
        "8 x 400 Gbit/s", 450, "H100 data sheet: NVLink, 18 links of 25 GB/s and direction",
    )  # fmt: skip
    system = replace(of_batch(preset.system, 400), method=replace(preset.system.method, item_bytes=2))
    method = "NCCL, ring or tree by message; buckets as ours, float16 (assumed: theirs is MXNet over Horovod)"
    return Preset(system, 8, "ResNet-50, n = 400, 8 H100 a node, 8 x 400 Gbit/s", preset.sources | {"method": method})


PRESETS = {
    "goyal-p100-50gbe": goyal,
    "horovod-512-inception3": lambda: horovod("inception3", 134.4),
    "horovod-512-resnet101": lambda: horovod("resnet101", 119.4),
    "horovod-512-vgg16": lambda: horovod("vgg16", 130.9),
    "v100-edr": lambda: modern(
        "V100", 1200, "NVIDIA DeepLearningExamples, PyTorch, DGX-1 16 GB, mixed precision", 400,
        "4 x InfiniBand EDR", 150, "V100 data sheet: NVLink, 6 links of 25 GB/s and direction",
    ),
    "a100-hdr": lambda: modern(
        "A100", 2470, "NVIDIA DeepLearningExamples, PyTorch, DGX A100, mixed precision", 1600,
        "8 x InfiniBand HDR", 300, "A100 data sheet: NVLink, 12 links of 25 GB/s and direction",
    ),
    "h100-ndr": lambda: modern(
        "H100", 6900, "derived from MLPerf Training 3.0, 13.466 min on 8 H100", 3200,
        "8 x 400 Gbit/s", 450, "H100 data sheet: NVLink, 18 links of 25 GB/s and direction (H200 the same)",
    ),
    "mlperf-h100": mlperf,
}  # fmt: skip


class Published(NamedTuple):
    """An efficiency that somebody measured: images/s a rank over those of the baseline. used: the two fitted numbers
    were fitted to it. samples: a rank, where they are not the preset's, of a rank that alone computes so many
    images/s; None: as many as with the preset's."""

    preset: str
    nodes: int
    baseline_ranks: int
    efficiency: float
    source: str
    used: bool
    samples: int | None = None
    images_per_s: float | None = None


def strong_scaling(nodes: int, efficiency: float, samples: int, images_per_s: float | None = None) -> Published:
    said = f"MLPerf Training 4.0: {8 * nodes} GPUs, n = {samples}" + (", a GPU at its rate" if images_per_s else "")
    return Published("mlperf-h100", nodes, 8, efficiency, said, False, samples, images_per_s)


# nodes, efficiency over 8 GPUs with n = 400, n of a GPU, its images/s then, with all that it waits for
MLPERF = ((2, 0.876, 200, 6272), (8, 0.685, 50, 4908), (316, 0.380, 16, 2819), (448, 0.394, 16, 2819))

PUBLISHED = (
    Published("goyal-p100-50gbe", 44, 8, 1 / 1.12, "Goyal et al. 2017, figure 7: step time + 12 %", True),
    Published("goyal-p100-50gbe", 32, 8, 0.90, "Goyal et al. 2017, figure 8: 8 to 256 GPUs, ~90 %", True),
    Published("horovod-512-inception3", 128, 1, 0.90, "Horovod, docs/benchmarks: 512 GPUs", True),
    Published("horovod-512-resnet101", 128, 1, 0.90, "Horovod, docs/benchmarks: 512 GPUs", True),
    Published("horovod-512-vgg16", 128, 1, 0.68, "Horovod, docs/benchmarks: 512 GPUs", True),
    Published("horovod-512-inception3", 4, 1, 2022.6 / 16 / 134.4, "Horovod pull request 44: 16 GPUs, RDMA", False),
    Published("horovod-512-resnet101", 4, 1, 1746.2 / 16 / 119.4, "Horovod pull request 44: 16 GPUs, RDMA", False),
    Published("horovod-512-vgg16", 4, 1, 1787.4 / 16 / 130.9, "Horovod pull request 44: 16 GPUs, RDMA", False),
    Published("v100-edr", 1, 1, 8322 / 8 / 1200, "NVIDIA DeepLearningExamples: 8 V100, real data", False),
    Published("a100-hdr", 1, 1, 16621 / 8 / 2470, "NVIDIA DeepLearningExamples: 8 A100, real data", False),
    *(strong_scaling(*point[:3]) for point in MLPERF),
    *(strong_scaling(*point) for point in MLPERF),
)
