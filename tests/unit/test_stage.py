"""Node-local copies: whole or not there, checked, made once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import changed, command, write_images, write_recipe

from hpc_lbsgd import private
from hpc_lbsgd.data import manifest, pack, stage, verify
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import validate
from hpc_lbsgd.train.prepare import stage_folder

COPY = (
    "import sys; from hpc_lbsgd.data import manifest, stage; stage.stage(manifest.Manifest(sys.argv[1]), sys.argv[2])"
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    return pack.pack(trees.index(write_images(root / "d", 80, 16), processes=1).path, root / "p", pack.Encoding(), 0.03)


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.tar")}


def test_a_copy_is_the_set_and_is_made_once(packed, tmp_path):
    m = stage.stage(packed, tmp_path)
    assert m.fingerprint == packed.fingerprint and m.root.is_relative_to(tmp_path.resolve())
    m.check_files()
    assert not verify.verify(m.path, processes=1).findings
    before = times(m.root)
    stage.stage(packed, tmp_path)
    assert times(m.root) == before and len(before) == len(packed.shards) > 3


def test_two_packs_of_one_set_are_two_copies(packed, tmp_path):
    """Bytes that are kept are the same data by fingerprint, but they lie elsewhere."""
    source = packed.root.parent / "d" / "manifest.arrow"
    other = pack.pack(source, tmp_path / "p", pack.Encoding(), 0.06, 1)
    assert other.fingerprint == packed.fingerprint
    copies = [stage.stage(m, tmp_path / "s") for m in (packed, other)]
    assert copies[0].root != copies[1].root
    for copy in copies:
        assert copy.root.stat().st_mode & 0o777 == 0o700
        assert not verify.verify(copy.path, processes=1).findings
    (other.root / "exclude.txt").write_text(f"{other.key(3)}\n")
    fewer = stage.stage(manifest.Manifest(other.path), tmp_path / "s")
    assert len(fewer) == len(other) - 1 and len(manifest.Manifest(copies[1].path)) == len(other)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user")
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_of_another_user_is_not_believed(packed, tmp_path, kind):
    target = stage.folder_of(packed, tmp_path / "s")
    target.parent.mkdir()
    if kind == "folder":
        target.mkdir()
        os.chown(target, 12345, 12345)
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is not a folder of yours"):
        stage.stage(packed, tmp_path / "s")
    assert not list(target.iterdir())


@pytest.mark.parametrize("harm", ["cut", "gone", "other bytes"])
def test_a_damaged_copy_is_made_again(packed, tmp_path, harm):
    m = stage.stage(packed, tmp_path)
    victim = m.root / m.shards[1]["name"]
    before = times(m.root)
    if harm == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    elif harm == "other bytes":
        times_there = victim.stat()
        victim.write_bytes(bytes(len(victim.read_bytes())))
        os.utime(victim, ns=(times_there.st_atime_ns, times_there.st_mtime_ns))
    else:
        victim.unlink()
    stage.stage(packed, tmp_path).check_files()
    assert {n for n, t in times(m.root).items() if before[n] != t} == {victim.name}
    assert not verify.verify(m.path, processes=1).findings


def test_a_source_that_is_not_what_was_packed_is_named(packed, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in packed.root.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    broken = copy / packed.shards[2]["name"]
    with open(broken, "r+b") as f:
        f.seek(700)
        f.write(b"\x55")
    with pytest.raises(RunError, match=f"{broken.name}: not the bytes that were packed"):
        stage.stage(manifest.Manifest(copy / "manifest.arrow"), tmp_path / "stage")
    (folder,) = (tmp_path / "stage").iterdir()
    assert not (folder / broken.name).exists() and not (folder / "manifest.arrow").exists()


def test_killed_copies_leave_nothing_half(packed, tmp_path):
    """kill -9 at many moments: what has its name is whole, and the next start finishes."""
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
        job = subprocess.Popen([sys.executable, "-c", COPY, str(packed.path), str(tmp_path)], start_new_session=True)
        end = time.monotonic() + 60
        while not list(tmp_path.glob("*/lock")) and job.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(delay)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        expected = {s["name"]: s["bytes"] for s in packed.shards}
        for path in tmp_path.glob("*/shard-*.tar"):
            assert path.stat().st_size == expected[path.name]
    m = stage.stage(packed, tmp_path)
    assert not verify.verify(m.path, processes=1).findings


def test_two_jobs_on_a_node_copy_once(packed, tmp_path):
    jobs = [subprocess.Popen([sys.executable, "-c", COPY, str(packed.path), str(tmp_path)]) for _ in range(2)]
    assert [job.wait(60) for job in jobs] == [0, 0]
    (folder,) = tmp_path.iterdir()
    assert len(json.loads((folder / "staged.json").read_text())) == len(packed.shards)
    manifest.Manifest(folder / "manifest.arrow").check_files()


def test_no_room_and_single_files_are_refused(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(private.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(RunError, match="GB free"):
        stage.stage(packed, tmp_path)
    loose = trees.index(write_images(tmp_path / "d", 4, 16), processes=1)
    with pytest.raises(RequestError, match="machine.stage_dir.*single image files"):
        stage.stage(loose, tmp_path)


def test_a_sites_folder_holds_for_packed_sets_and_binds_no_other(small_recipe, small_data, tmp_path):
    """Its variables are those of the node where the run is; the recipe's own folder goes first."""
    pack.pack(small_data / "train", tmp_path / "packed", pack.Encoding(), 0.05, 1)
    recipe = changed(small_recipe, data__train=str(tmp_path / "packed"), train__max_steps=1)  # eval: single files
    site = {"HPC_LBSGD_STAGE_DIR": "$NODE_DISK/stage"}
    words = ["train", write_recipe(tmp_path / "r.yaml", recipe), "--run"]
    done = command(*words, tmp_path / "run", env=site | {"NODE_DISK": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "stage").glob("*/shard-*.tar"))
    refused = command(*words, tmp_path / "other", env=site)
    assert refused.returncode == 2 and "HPC_LBSGD_STAGE_DIR = $NODE_DISK/stage: a variable" in refused.stderr


def test_the_recipes_stage_folder_goes_before_the_sites(monkeypatch):
    monkeypatch.setenv("HPC_LBSGD_STAGE_DIR", "/site")
    monkeypatch.setenv("DISK", "/disk")
    assert stage_folder(validate({})) == "/site"
    assert stage_folder(validate({"machine": {"stage_dir": "$DISK/mine"}})) == "/disk/mine"
    monkeypatch.delenv("HPC_LBSGD_STAGE_DIR")
    assert stage_folder(validate({})) is None
