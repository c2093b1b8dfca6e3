"""An environment in one file, and on a node's disk: whole or not there, believed only as it was unpacked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_environment

from hpc_lbsgd import private
from hpc_lbsgd.cluster import bundle, unbundle
from hpc_lbsgd.errors import RequestError, RunError

ROOT = Path(__file__).parents[2]
NAME = "my env 'ü\" $x"  # a shell, a tar and JSON would each stumble over some of it


def run(python, *words, **env):
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE"))}
    return subprocess.run([python, *map(str, words)], capture_output=True, text=True, env={**own, **env}, cwd="/")


def pack(env, target, before=""):
    code = (
        f"import sys, os, signal\nfrom hpc_lbsgd import cli\nfrom hpc_lbsgd.cluster import bundle\n{before}\ncli.run()"
    )
    return run(env / "bin" / "python", "-c", code, "bundle", target, "--json")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    env = write_environment(tmp_path_factory.mktemp("env") / NAME)
    (packages,) = env.glob("lib/python3*/site-packages")
    (packages / "mine").mkdir()
    (packages / "mine" / "__init__.py").write_text("x = 5\n")
    (packages / "~ine").mkdir()
    (packages / "~ine" / "half.py").touch()  # pip was interrupted
    (env / ".pytest_cache").mkdir()
    (env / ".pytest_cache" / "much").touch()
    (env / "to folder").symlink_to("lib")
    (env / ("long" * 60)).write_text("longer than tar's own names\n")
    return env


@pytest.fixture(scope="module")
def packed(env, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / f"{NAME}.tar"
    result = pack(env, target)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["checksum"] == bundle.read(target).checksum
    assert said["outside"] == [path for path in sys.path if path.endswith("site-packages")]  # by others.pth
    return target


def test_the_environment_works_where_it_is_unpacked_without_the_old_one(env, packed, tmp_path):
    python, fresh = unbundle.unbundle(packed, tmp_path / "node's disk")
    assert fresh
    away = env.with_name("away")
    env.rename(away)
    try:
        code = "import sys, mine, numpy, hpc_lbsgd, hpc_lbsgd.origin as o; "
        code += "print(sys.prefix, hpc_lbsgd.__file__, mine.x, o.commit(), sep='|')"
        prefix, program, x, commit = run(python, "-c", code).stdout.strip().split("|")
    finally:
        away.rename(env)
    assert Path(prefix) == python.parents[1] and Path(program).is_relative_to(prefix) and x == "5"
    assert commit == str(bundle.read(packed).commit)
    there = {p.name for p in Path(prefix).rglob("*")}
    assert {"to folder", "long" * 60} < there and not {"~ine", "half.py", "much"} & there
    assert os.readlink(Path(prefix) / "to folder") == "lib"
    assert python.parents[2].stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_packed_is_refused(env, tmp_path):
    for target, said in ((env / "x.tar", "inside the environment"), (tmp_path, "a folder"),
                         (tmp_path / "no" / "x.tar", "no folder")):  # fmt: skip
        refused = pack(env, target)
        assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1
    base = os.path.realpath(sys.executable)
    refused = run(
        base, "-m", "hpc_lbsgd.cli", "bundle", tmp_path / "x.tar", PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])
    )
    assert refused.returncode == 2 and "not made by venv" in refused.stderr
    assert not list(tmp_path.iterdir())


HALF = """\
whole = bundle.Watched.read
def read(self, size=-1):
    {}
    return whole(self, size)
bundle.Watched.read = read
"""


@pytest.mark.parametrize("how, left", [("raise KeyboardInterrupt", 0), ("os.kill(os.getpid(), signal.SIGKILL)", 1)])
def test_packing_that_is_interrupted_leaves_what_was_there(how, left, env, packed, tmp_path):
    target = tmp_path / "x.tar"
    target.write_bytes(packed.read_bytes())
    assert pack(env, target, HALF.format(how)).returncode in (130, -signal.SIGKILL)
    assert target.read_bytes() == packed.read_bytes() and len(list(tmp_path.iterdir())) == 1 + left
    assert pack(env, target).returncode == 0
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("change", ["open(self.name, 'w').close()", "open(self.name, 'a').write('y = 6')"])
def test_an_environment_that_changes_meanwhile_is_not_packed(change, env, tmp_path):
    changes = HALF.format(f"if str(self.name).endswith('mine/__init__.py'): {change}")
    refused = pack(env, tmp_path / "x.tar", changes)
    next(env.glob("lib/python3*/site-packages/mine/__init__.py")).write_text("x = 5\n")
    assert refused.returncode == 1 and "while it was packed" in refused.stderr, refused.stderr
    assert not list(tmp_path.iterdir())


def damaged(packed, target, place):
    content = bytearray(packed.read_bytes())
    if place == "cut":
        del content[len(content) // 2 :]
    elif place == "empty":
        content.clear()
    else:
        content[place] ^= 1
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("place", [600, bundle.BEFORE_SUM + 3, 200_000, -20_000, "cut", "empty"])
def test_a_damaged_bundle_is_refused_and_nothing_is_kept(packed, place, tmp_path):
    with pytest.raises((RequestError, RunError), match="damaged|not the bytes that were packed"):
        unbundle.unbundle(damaged(packed, tmp_path / "x.tar", place), tmp_path / "disk")
    assert not list(tmp_path.glob("disk/*/env")) and not list(tmp_path.glob("disk/*/.unpacking"))


def test_without_room_nothing_is_written(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(private.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(RunError, match=r"stage_dir: .* has 0\.0 GB free, and .* GB are to be copied"):
        unbundle.unbundle(packed, tmp_path)
    assert not list(tmp_path.glob("*/env"))


def test_a_node_without_the_python_is_told_which(packed, tmp_path):
    target = tmp_path / "x.tar"
    target.write_bytes(packed.read_bytes())
    other = replace(bundle.read(packed), base="/opt/no/python3.9")
    with open(target, "r+b") as file:
        file.write(other.head())
    with pytest.raises(RunError, match="needs Python .* at /opt/no/python3.9, which this node lacks"):
        unbundle.unbundle(target, tmp_path / "disk")
    with open(target, "r+b") as file:
        file.write(replace(other, base=sys.executable, python="3.9.1").head())
    with pytest.raises(RunError, match="is not the Python 3.9.1 that was packed"):
        unbundle.unbundle(target, tmp_path / "disk")


HARM = {
    "gone": lambda path: path.unlink(),
    "another": lambda path: path.write_text("x = 6\n"),
    "more": lambda path: (path.parent / "torch.py").touch(),
    "half": lambda path: (path.parents[5] / "staged.json").unlink(),
}


@pytest.mark.parametrize("harm", HARM)
def test_it_is_unpacked_once_and_again_where_something_changed(packed, harm, tmp_path):
    python, _ = unbundle.unbundle(packed, tmp_path)
    assert run(python, "-c", "import mine").returncode == 0  # what Python adds is no change
    assert unbundle.unbundle(packed, tmp_path) == (python, False)
    (path,) = python.parents[1].glob("lib/python3*/site-packages/mine/__init__.py")
    HARM[harm](path)
    assert unbundle.unbundle(packed, tmp_path) == (python, True)
    assert path.read_text() == "x = 5\n" and not (path.parent / "torch.py").exists()


def test_unpacking_that_was_killed_is_begun_again(packed, tmp_path):
    code = "import os, sys; from hpc_lbsgd.cluster import unbundle; os.rename = lambda *a: os.kill(os.getpid(), 9); "
    code += "from pathlib import Path; unbundle.unbundle(Path(sys.argv[1]), sys.argv[2])"
    killed = run(sys.executable, "-c", code, packed, tmp_path, PYTHONPATH=str(ROOT))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(tmp_path.glob("*/.unpacking")) and not list(tmp_path.glob("*/env"))
    assert unbundle.unbundle(packed, tmp_path)[1]
    assert not list(tmp_path.glob("*/.unpacking"))


def test_two_jobs_on_a_node_unpack_once(packed, tmp_path):
    words = [sys.executable, "-m", "hpc_lbsgd.cli", "stage-bundle", packed]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HPC_LBSGD_STAGE_DIR": str(tmp_path)}
    jobs = [subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate(timeout=60)[0].split(maxsplit=2) for job in jobs]
    assert sorted(how for _, how, _ in said) == ["there", "unpacked"] and said[0][2] == said[1][2]


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
def test_a_folder_of_another_user_is_not_believed(packed, tmp_path):
    python, _ = unbundle.unbundle(packed, tmp_path)
    os.chown(python.parents[2], 12345, 12345)
    with pytest.raises(RunError, match="stage_dir: .* is not a folder of yours"):
        unbundle.unbundle(packed, tmp_path)


def test_no_job_runs_from_where_everybody_can_put_another_program(packed, tmp_path):
    """The folder is the user's alone, its name is not."""
    disk = tmp_path / "disk"
    (disk / "me").mkdir(parents=True)
    disk.chmod(0o777)
    with pytest.raises(RunError, match=f"stage_dir: everybody can rename what lies in {disk} .mode 777, without"):
        unbundle.unbundle(packed, disk / "me")
    assert not list(disk.glob("me/*/env"))
    disk.chmod(0o1777)
    assert unbundle.unbundle(packed, disk / "me")[1]


def test_unpacking_removes_what_nobody_has_used_for_a_day(packed, tmp_path):
    python, _ = unbundle.unbundle(packed, tmp_path)
    kept, unused, running = (tmp_path / f"{os.geteuid()}-bundle-{name}" for name in ("kept", "unused", "running"))
    for folder in (kept, unused, running):
        shutil.copytree(python.parents[2], folder, symlinks=True)
    others = tmp_path / f"{os.geteuid()}-0123456789abcdef"  # a set that is staged
    others.mkdir()
    for folder in (unused, running):
        os.utime(folder / "lock", (time.time() - 90_000,) * 2)
    held = subprocess.Popen([running / "env" / "bin" / "python", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        HARM["gone"](python.parents[2] / "staged.json")
        assert unbundle.unbundle(packed, tmp_path)[1]
    finally:
        held.communicate(b"\n")
    assert set(tmp_path.iterdir()) == {python.parents[2], kept, running, others}


def test_who_submits_from_another_environment_by_now_is_told(env, packed, monkeypatch):
    assert bundle.out_of_date(str(packed)) is None  # packed elsewhere
    monkeypatch.setattr(bundle.sys, "prefix", str(env))
    monkeypatch.setattr(bundle, "packages", lambda: bundle.read(packed).packages)
    assert bundle.out_of_date(str(packed)) is None
    monkeypatch.setattr(bundle, "packages", lambda: "another")
    assert "what pip has installed is another one since" in bundle.out_of_date(str(packed))


def test_what_a_job_runs_from_is_mended_under_it_and_never_taken_away(packed, tmp_path):
    """Two jobs share a node, and something in the environment is another one by the start of the second."""
    python, _ = unbundle.unbundle(packed, tmp_path)
    packages = next(python.parents[1].glob("lib/python3*/site-packages"))
    held = subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        kept = [(path, path.stat().st_ino) for path in (packages, packages / "mine")]
        HARM["another"](packages / "mine" / "__init__.py")
        (packages / "its own cache").touch()
        assert unbundle.unbundle(packed, tmp_path) == (python, True)
        assert [(path, path.stat().st_ino) for path, _ in kept] == kept
        assert (packages / "mine" / "__init__.py").read_text() == "x = 5\n" and (packages / "its own cache").exists()
        assert unbundle.unbundle(packed, tmp_path) == (python, False)
    finally:
        held.communicate(b"\n")


def test_a_link_to_a_folder_that_is_gone_is_missed_and_another_way_to_the_disk_is_none(packed, tmp_path):
    python, _ = unbundle.unbundle(packed, tmp_path / "disk")
    (tmp_path / "link").symlink_to("disk")
    assert not unbundle.unbundle(packed, tmp_path / "link")[1]
    (python.parents[1] / "to folder").unlink()
    assert unbundle.unbundle(packed, tmp_path / "disk") == (python, True)
    assert unbundle.unbundle(packed, tmp_path / "link" / ".." / "disk") == (python, False)


def test_one_that_is_packed_anew_while_a_node_unpacks_it_is_unpacked_as_it_is_then(packed, tmp_path, monkeypatch):
    target = tmp_path / "x.tar"
    target.write_bytes(packed.read_bytes())
    extract = unbundle.extract

    def meanwhile(path, folder):
        monkeypatch.setattr(unbundle, "extract", extract)
        anew = target.with_name("anew")
        anew.write_bytes(packed.read_bytes())
        with open(anew, "r+b") as file:
            file.write(replace(bundle.read(packed), commit="another").head())
        anew.replace(target)
        return "of the one before", ""

    monkeypatch.setattr(unbundle, "extract", meanwhile)
    python, fresh = unbundle.unbundle(target, tmp_path / "disk")
    assert fresh and bundle.read(target).checksum[:16] in str(python)
