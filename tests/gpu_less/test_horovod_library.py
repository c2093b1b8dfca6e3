"""The Horovod that is installed, looked at as the GPU node's loader will: nothing is run on a device."""

import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

PACKAGES = Path(sysconfig.get_path("platlib"))
INFO = PACKAGES / "horovod" / "hpc_lbsgd_build.json"


def output(*command) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def library() -> Path:
    made = json.loads(INFO.read_text()) if INFO.exists() else {}
    if not made.get("cuda"):
        pytest.skip("this Horovod is for CPUs alone: python tools/build_horovod.py --gpu nccl")
    if not shutil.which("readelf"):
        pytest.skip("no readelf: apt-get install binutils")
    return next((PACKAGES / "horovod" / "torch").glob("mpi_lib_v2*.so"))


def test_it_sums_with_nccl_and_finds_it_beside_torch(library):
    dynamic = output("readelf", "-d", library)
    assert "libnccl.so.2" in dynamic and "libcudart.so" in dynamic and "libmpi.so" in dynamic
    folders = re.search(r"runpath: \[(.+)\]", dynamic)[1].split(":")
    assert all(folder.startswith("$ORIGIN/") or Path(folder).is_absolute() for folder in folders)
    beside = [(library.parent / folder.replace("$ORIGIN/", "")).resolve() for folder in folders]
    for name in ("libnccl.so.2", "libtorch_cpu.so", "libc10_cuda.so"):
        assert any((folder / name).exists() for folder in beside), name
    undefined = output("nm", "-D", "--undefined-only", library)
    assert {"ncclAllReduce", "ncclBroadcast", "ncclCommInitRank"} <= set(re.findall(r" U (nccl\w+)", undefined))


def test_nothing_that_it_needs_is_missing(library):
    """Python's own symbols are the interpreter's, and the driver's come with the node."""
    told = output("ldd", "-r", library)
    assert re.findall(r"(\S+) => not found", told) in ([], ["libcuda.so.1"])
    assert [s for s in re.findall(r"undefined symbol: (\S+)", told) if not re.match(r"_?Py", s)] == []


def test_it_has_code_for_the_gpus_it_says(library):
    triton = PACKAGES / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    dump = triton if triton.exists() else shutil.which("cuobjdump")
    if not dump:
        pytest.skip("no cuobjdump")
    said = json.loads(INFO.read_text())["cuda_archs"].split(",")
    assert set(re.findall(r"sm_(\d+)", output(dump, "--list-elf", library))) == set(said)
