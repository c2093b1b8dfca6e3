"""What is installed from an index: an sdist, a wheel made of it, and that wheel at work outside this tree."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpc_lbsgd import __version__

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, tree: Path, out: Path, **environment: str) -> Path:
    """What a package index is sent, of `tree`. Setuptools' own hooks: no network, no isolation."""
    words = [sys.executable, "-c", BUILD, f"build_{kind}", out]
    result = subprocess.run(words, cwd=tree, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out / result.stdout.split()[-1]


def copy_of_the_tree(to: Path) -> Path:
    """Builds leave folders behind. Without what is not the project's: .git, .venv, runs, data."""
    kept = ["hpc_lbsgd", "tools", "docs", "modules", "slurm"]
    kept += [p.name for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")]
    subprocess.run(["cp", "-r", *kept, to], cwd=ROOT, check=True)
    for made in to.rglob("*.so"):
        made.unlink()
    return to


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the wheel was installed to."""
    root = tmp_path_factory.mktemp("package")
    for name in ("tree", "dist", "unpacked"):
        (root / name).mkdir()
    sdist = build("sdist", copy_of_the_tree(root / "tree"), root / "dist")
    shutil.unpack_archive(sdist, root / "unpacked")
    (source,) = (root / "unpacked").iterdir()
    assert {"Makefile", "constraints.txt", "tools", "LICENSE", "CHANGELOG.md"} <= {p.name for p in source.iterdir()}
    wheel = build("wheel", source, root / "dist")
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "hpc_lbsgd").rglob("*") if p.is_file()}
    with zipfile.ZipFile(wheel) as packed:
        packed = set(packed.namelist())
        missing = {name for name in ours if "__pycache__" not in name} - packed
    assert missing == set(), "package_data in setup.cfg"
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", root / "site", wheel]
    subprocess.run([sys.executable, *words], check=True)
    return root / "site"


def python(installed: Path, *words: str | Path) -> str:
    """Output of Python with the installed package, in a folder that has nothing of this tree."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run([sys.executable, *words], cwd=installed.parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_installed_command_knows_its_recipes_sites_and_templates(installed):
    command = installed / "bin" / "hpc-lbsgd"
    assert python(installed, "-c", "import hpc_lbsgd; print(hpc_lbsgd.__file__)").startswith(str(installed))
    assert python(installed, command, "--version").split() == ["hpc-lbsgd", __version__]
    assert "submit" in python(installed, command, "--help")
    plan = json.loads(python(installed, command, "plan", "goyal-resnet50", "--nodes", "32", "--json"))
    assert plan["global_batch"] == 8192
    script = python(installed, command, "submit", "goyal-resnet50", "--nodes", "2", "--site", "template", "--dry-run")
    assert "#SBATCH --nodes=2" in script


def test_a_machine_without_a_c_compiler_installs_it_too(tmp_path):
    for name in ("tree", "dist"):
        (tmp_path / name).mkdir()
    wheel = build("wheel", copy_of_the_tree(tmp_path / "tree"), tmp_path / "dist", CC="no-such-compiler")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "site")
    assert "hpc_lbsgd/parallel/cpu_kernels.py" in names and not any(name.endswith(".so") for name in names)
    code = "import torch; from hpc_lbsgd.parallel import fixed_point as f; "
    told = python(
        tmp_path / "site", "-W", "error", "-c", code + "print(f.kernels_for(torch.device('cpu'), torch.float32))"
    )
    assert told.strip() == "None"


def test_flags_for_fast_mathematics_are_taken_back(tmp_path):
    """They would hide a NaN, and the linker's part of them takes subnormals from all that the process computes."""
    if not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("no C compiler")
    for name in ("tree", "dist"):
        (tmp_path / name).mkdir()
    flags = "-Ofast -ffast-math -funsafe-math-optimizations -ffinite-math-only -ftrapv"
    wheel = build("wheel", copy_of_the_tree(tmp_path / "tree"), tmp_path / "dist", CFLAGS=flags)
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    code = "import torch; from hpc_lbsgd.parallel import fixed_point as f; "
    code += "made = f.kernels_for(torch.device('cpu'), torch.float32); "
    code += "x, totals, flag = torch.full((9,), -1.0), torch.full((9,), -(2**63)), torch.zeros((), dtype=torch.bool); "
    code += "made.add(x, totals, flag, 0, 2.0, 2.0, 8.0, False, True); "  # after a NaN; a worker more ends no process
    code += "print(made is not None, (torch.full((1,), 1e-40) * 1).item() > 0)"
    told = python(tmp_path / "site", "-W", "error", "-c", code)
    assert told.split() == ["True", "True"]


def test_a_library_of_another_c_file_is_refused(installed):
    """One that stayed when the package's files were brought up to date, and nobody could, or did, compile it."""
    code = "import sys, torch; from hpc_lbsgd.parallel import fixed_point as f; "
    code += "made = f.kernels_for(torch.device('cpu'), torch.float32); "
    if not list(installed.rglob("_cpu_kernels*")):
        pytest.skip("no C compiler")
    assert python(installed, "-W", "error", "-c", code + "print(made is not None)") == "True\n"
    source = installed / "hpc_lbsgd" / "parallel" / "cpu_kernels.c"
    before = source.read_bytes()
    try:
        source.write_bytes(before.replace(b"int first, int clear", b"int clear, int first"))
        code = "import warnings; warnings.showwarning = print; " + code
        code += "from hpc_lbsgd.cluster import doctor; print(made, *doctor.check_fixed_point())"
        told = python(installed, "-c", code)
        assert "was compiled of another cpu_kernels.c" in told and "Installing the package again mends it" in told
        assert told.splitlines()[-1].startswith("None Finding(") and told.count("of another cpu_kernels.c") == 2
    finally:
        source.write_bytes(before)


def test_a_c_file_that_came_with_its_time_is_compiled(tmp_path):
    """By rsync or from an archive: older than the library that lies in build/ of the version before."""
    if not shutil.which(os.environ.get("CC", "cc")):
        pytest.skip("no C compiler")
    source, found = copy_of_the_tree(tmp_path) / "hpc_lbsgd" / "parallel" / "cpu_kernels.c", []
    for line in (b"", b"/* new */\n"):
        source.write_bytes(source.read_bytes() + line)
        os.utime(source, (0, 0))
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, check=True)
        (library,) = source.parent.glob("*.so")
        found.append(library.read_bytes())
    assert found[0] != found[1]
