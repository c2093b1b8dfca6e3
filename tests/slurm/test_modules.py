"""Modulefiles, loaded for real by Lmod and by Environment Modules."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ODD = 'my env\'s "$HOME" [exit] {x}; (1)'


def lmod():
    """The shell line that defines `module`, or None."""
    for path in ("/usr/share/lmod/lmod/init/bash", "/usr/share/lmod/8.6.19/init/bash"):
        if Path(path).exists():
            return f"source {path}"
    return None


def environment_modules(tmp):
    """The same, for modulecmd.tcl: installed, or unpacked (Debian's packages of the two cannot both be installed)."""
    found = shutil.which("modulecmd.tcl") or next(
        (str(p) for p in Path("/usr/lib").rglob("modulecmd.tcl") if p.is_file()), None
    )
    if not found and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "download", "-q", "environment-modules"], cwd=tmp, capture_output=True, timeout=60)
        for package in tmp.glob("environment-modules_*.deb"):
            subprocess.run(["dpkg", "-x", package, tmp / "unpacked"], check=True)
        found = next((str(p) for p in tmp.glob("unpacked/usr/lib/*/modulecmd.tcl")), None)
    if not found or not shutil.which("tclsh"):
        return None
    return f'module() {{ eval "$(tclsh {shlex.quote(found)} bash "$@")"; }}'


@pytest.fixture(scope="module", params=["lmod", "tcl"])
def system(request, tmp_path_factory):
    """(kind, line that defines `module`)"""
    kind = request.param
    line = lmod() if kind == "lmod" else environment_modules(tmp_path_factory.mktemp("modules"))
    if not line:
        pytest.skip(f"not installed: {'lmod' if kind == 'lmod' else 'environment-modules and tcl'}")
    return kind, line


@pytest.fixture
def prefix(tmp_path):
    """Modulefiles of an environment with an odd name, beside those of a compiler and a rival."""
    tool = tmp_path / ODD / "bin" / "hpc-lbsgd"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho it is me\n")
    tool.chmod(0o755)
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_module.py", tmp_path / "files", "--environment", tmp_path / ODD,
         "--prereq", "gcc/12 openmpi/4.1", "--conflict", "rival"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    for kind, text, suffix in (("lmod", 'setenv("X", "1")', ".lua"), ("tcl", "#%Module1.0\nsetenv X 1", "")):
        for name in ("gcc/12", "openmpi/4.1", "rival/1"):
            path = tmp_path / "files" / kind / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
    return tmp_path / "files"


def shell(system, prefix, script):
    kind, line = system
    text = f"{line}\nmodule use {shlex.quote(str(prefix / kind))}\n{script}"
    clean = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8"}
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=clean, timeout=60)


def test_load_and_unload(system, prefix, tmp_path):
    result = shell(system, prefix, """
module load hpc_lbsgd/0.1.0
hpc-lbsgd; echo "$HPC_LBSGD_ENVIRONMENT"; echo "$LOADEDMODULES"
module unload hpc_lbsgd
command -v hpc-lbsgd || echo gone; echo "${HPC_LBSGD_ENVIRONMENT-unset}" """)  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[:2] == ["it is me", str(tmp_path / ODD)], result.stdout + result.stderr
    assert "hpc_lbsgd/0.1.0" in lines[2]
    assert lines[-1] == "unset"


def test_prerequisites_are_loaded_too(system, prefix):
    result = shell(system, prefix, 'module load hpc_lbsgd; hpc-lbsgd; echo "$LOADEDMODULES"')
    assert "it is me" in result.stdout, result.stderr
    assert {"gcc/12", "openmpi/4.1"} < set(result.stdout.split()[-1].split(":"))


def test_without_a_prerequisite_or_beside_a_rival_it_is_not_loaded(system, prefix):
    for path in prefix.glob("*/openmpi/4.1*"):
        path.unlink()
    result = shell(system, prefix, "module load hpc_lbsgd; hpc-lbsgd")
    assert "openmpi/4.1" in result.stderr and "it is me" not in result.stdout
    result = shell(system, prefix, "module load rival; module load hpc_lbsgd; hpc-lbsgd")
    assert "rival" in result.stderr and "it is me" not in result.stdout


def test_help_and_whatis(system, prefix):
    result = shell(system, prefix, "module help hpc_lbsgd; module whatis hpc_lbsgd")
    said = result.stdout + result.stderr
    assert "hpc-lbsgd doctor" in said and "0.1.0" in said and "large-minibatch SGD" in said


def test_an_environment_that_is_not_there_is_refused(tmp_path):
    words = [sys.executable, ROOT / "tools" / "make_module.py", tmp_path, "--environment", tmp_path / "none"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2 and "make setup first" in result.stderr
