"""What `doctor` says of GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpc_lbsgd.cluster.finding import FAIL, OK, WARN, Finding, output_of, version
from hpc_lbsgd.parallel.compiler import why_not


def check_gpus() -> Iterator[Finding]:
    """Driver against torch's CUDA, NCCL, who makes kernels and who decodes, and how the GPUs are wired."""
    import torch

    facts = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not facts:
        return
    header = output_of("nvidia-smi") or ""
    newest = re.search(r"CUDA Version: (\d+)\.(\d+)", header)
    if newest and torch.version.cuda:
        # a driver runs every CUDA of its own major version, and older ones
        fits = int(newest[1]) >= int(torch.version.cuda.split(".")[0])
        yield Finding(
            OK if fits else FAIL,
            "cuda driver",
            f"{facts.splitlines()[0]}, up to CUDA {newest[1]}.{newest[2]}; torch is built for {torch.version.cuda}",
            "install a newer driver, or a torch build for an older CUDA",
        )
    if torch.cuda.is_available():
        yield Finding(OK, "nccl", f"torch's own: {'.'.join(map(str, torch.cuda.nccl.version()))}")
        problem = why_not(torch.device("cuda", 0))
        yield Finding(
            WARN if problem else OK,
            "torch's compiler",
            problem or "makes kernels for these GPUs",
            "machine.compile = auto does without, and small batches wait for launches; a C compiler mends it, mostly",
        )
        yield from check_nvjpeg()
    if torch.cuda.device_count() > 1:
        topology = output_of("nvidia-smi", "topo", "-m") or ""
        rows = [line.split() for line in topology.splitlines() if line.startswith("GPU")]
        links = sorted({word for row in rows for word in row[1:] if re.fullmatch(r"NV\d+|PIX|PXB|PHB|NODE|SYS", word)})
        slow = {"SYS", "NODE", "PHB"} & set(links)
        yield Finding(
            WARN if slow and not any(word.startswith("NV") for word in links) else OK,
            "gpu links",
            ", ".join(links) or "unknown",
            "GPUs reach each other through the CPU only; expect slow sums within a node",
        )


def check_nvjpeg() -> Iterator[Finding]:
    """The GPU's JPEG decoders: older ones than 13.2 take no part of a picture whose colour is at half the resolution,
    as most photographs' is (nvImageCodec 0.9, hw_decoder.cpp and cuda_decoder.cpp), and DALI does not say so."""
    found = version("nvidia-nvjpeg")
    if found:
        yield Finding(
            OK if tuple(map(int, found.split(".")[:2])) >= (13, 2) else WARN,
            "nvjpeg",
            found,
            "with resized crops DALI leaves photographs to the CPU without a word: pip install 'nvidia-nvjpeg>=13.2'",
        )
