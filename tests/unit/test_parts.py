"""Index and pack go on where they were, and are shared by nodes: nothing is decoded twice, nothing stale is kept."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import command, write_images

from hpc_lbsgd.data import archive, files, manifest, pack, parts, shards, verify
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.parts import Share
from hpc_lbsgd.errors import RequestError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "CHUNK", 10)
    monkeypatch.setattr(archive, "CHUNK", 10)
    return write_images(tmp_path / "d", 96, 16)


@pytest.fixture
def decoded(monkeypatch):
    """How many images were decoded, so far."""
    count, decode_all = [0], files.decode_all

    def counted(contents):
        count[0] += len(contents)
        return decode_all(contents)

    monkeypatch.setattr(files, "decode_all", counted)
    return count


def rows_of(m) -> list:
    return m.table.to_pylist()


def tar_of(root, path):
    import tarfile

    with tarfile.open(path, "w") as tar:
        tar.add(root, ".", filter=lambda m: None if ".arrow" in m.name else m)
    return path


def test_an_index_that_failed_keeps_what_it_knows(root, decoded):
    bad = root / "class-1" / "0001.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"no picture")
    with pytest.raises(RequestError, match="1 of 96 images cannot be read"):
        trees.index(root, processes=1)
    assert decoded[0] == 96 and parts.folder_of(root / "manifest.arrow").is_dir()
    bad.write_bytes(whole)
    m = trees.index(root, processes=1)
    assert decoded[0] == 96 + 10 and len(m) == 96  # the piece with the image that was mended
    assert not parts.folder_of(m.path).exists()
    again = trees.index(root, root.parent / "again.arrow", processes=1)
    assert rows_of(again) == rows_of(m) and again.fingerprint == m.fingerprint


def test_a_storage_that_failed_is_asked_again(root, decoded, monkeypatch):
    """The file is as it was: nothing about it says that the next look is another."""
    failing = str(root / "class-1" / "0001.png")

    def broken(path, *mode):
        if path == failing:
            raise OSError(5, "Input/output error")
        return open(path, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", broken, raising=False)
        with pytest.raises(RequestError, match="1 of 96 images cannot be read"):
            trees.index(root, processes=1)
    assert decoded[0] == 95
    assert len(trees.index(root, processes=1)) == 96 and decoded[0] == 95 + 10


@pytest.mark.parametrize("change", ["content", "time", "decoders", "gone", "torn"])
def test_what_is_stale_is_looked_at_anew(root, decoded, monkeypatch, change):
    assert trees.index(root, processes=1, share=Share(0, 2)) == 50
    target = root / "class-0" / "0000.png"
    if change == "content":  # of the same length, with the old time
        times, data = target.stat(), bytearray(target.read_bytes())
        other = (root / "class-0" / "0004.png").read_bytes()
        data = other if len(other) == len(data) else data
        target.write_bytes(data)
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "time":
        os.utime(target)
    elif change == "decoders":
        monkeypatch.setattr(parts, "decoders", lambda: {"pillow": "another"})
    elif change == "gone":
        target.unlink()
    else:
        for path in parts.folder_of(root / "manifest.arrow").glob("*.json"):
            path.write_text(path.read_text()[:20])
    before = decoded[0]
    m = trees.index(root, processes=1)
    anew = {"content": 10, "time": 10, "decoders": 50, "gone": 50, "torn": 50}[change]
    assert decoded[0] - before == anew + 46 - (change == "gone")
    fresh = trees.index(root, root.parent / "fresh.arrow", processes=1)
    assert rows_of(fresh) == rows_of(m) and not list(root.glob(".*"))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_parts_make_the_index_of_one_that_did_all(root, decoded, kind, tmp_path):
    source = root if kind == "folder" else tar_of(root, tmp_path / "d.tar")
    make = trees.index if kind == "folder" else archive.index
    assert sum(make(source, processes=1, share=Share(i, 3)) for i in (2, 0, 1)) == 96
    assert decoded[0] == 96 and not list(tmp_path.rglob("*.arrow"))
    m = make(source, processes=1)
    assert decoded[0] == 96
    alone = make(source, tmp_path / "d" / "alone.arrow", processes=1)
    assert rows_of(alone) == rows_of(m) and alone.fingerprint == m.fingerprint


def test_a_killed_index_goes_on(tmp_path):
    root = write_images(tmp_path / "d", 1600, 8)
    words = [sys.executable, "-m", "hpc_lbsgd.cli", "data", "index", str(root), "--processes", "1"]
    job = subprocess.Popen(words, start_new_session=True)
    folder, end = parts.folder_of(root / "manifest.arrow"), time.monotonic() + 60
    while not list(folder.glob("*.json")) and time.monotonic() < end:
        time.sleep(0.001)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    there = {p.name: p.stat().st_mtime_ns for p in folder.glob("[!.]*.json")}
    assert there and not (root / "manifest.arrow").exists()
    trees.index(root, processes=1, share=Share(1, 2))
    kept = {p.name: p.stat().st_mtime_ns for p in folder.glob("[!.]*.json")}
    assert there.items() <= kept.items()
    m = trees.index(root, processes=1)
    assert len(m) == 1600 and not folder.exists() and len(manifest.Manifest(m.path)) == 1600


def test_a_place_that_cannot_be_written_is_said_before_work(root, decoded):
    (root / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write .*choose another place with --out"):
        trees.index(root, root / "file" / "manifest.arrow", processes=1)
    assert decoded[0] == 0


def test_commands_share_an_index_and_a_pack(tmp_path):
    """Three at a time of each, as three nodes would; then one that joins them."""
    root, out = write_images(tmp_path / "d", 60, 16), tmp_path / "p"

    def all_parts(*words) -> None:
        line = [sys.executable, "-m", "hpc_lbsgd.cli", "data", *map(str, words), "--processes", "1", "--json"]
        jobs = [subprocess.Popen([*line, "--part", f"{i}/3"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                for i in range(3)]  # fmt: skip
        said = [job.communicate(timeout=120) for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0, 0], said
        assert sum(json.loads(told)["images"] for told, _ in said) == 60

    all_parts("index", root)
    assert not (root / "manifest.arrow").exists()
    m = trees.index(root, processes=1)
    all_parts("pack", root, out, "--shard-mb", "0.01")
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*.tar")}
    assert len(times) > 3 and not (out / "manifest.arrow").exists()
    with pytest.raises(RequestError, match="was begun there with|other options was begun there"):
        pack.pack(root, out, pack.Encoding("raw"), 0.01, 1)
    with pytest.raises(RequestError, match="other options was begun there"):
        shards.pack_share(pack.Images(root, pack.Encoding("raw")), out, 0.01, 1, Share(0, 2))
    packed = pack.pack(root, out, pack.Encoding(), 0.01, 1)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*.tar")} == times
    assert len(packed) == 60 and packed.fingerprint == m.fingerprint and not verify.verify(out, processes=1).findings
    assert set(os.listdir(out)) == {"classes.txt", "manifest.arrow", *times}
    assert shards.pack_share(pack.Images(root, pack.Encoding()), out, 0.01, 1, Share(0, 2)) == 0  # all is there
    alone = pack.pack(root, tmp_path / "alone", pack.Encoding(), 0.01, 1)
    assert rows_of(alone) == rows_of(packed) and np.array_equal(alone.offsets, packed.offsets)


def test_parts_that_are_none_are_refused(tmp_path):
    for wrong in ("3/3", "1", "-1/2", "a/b", "1/0"):
        job = command("data", "index", tmp_path, f"--part={wrong}")
        assert job.returncode == 2 and "must be I/N" in job.stderr


def test_a_pack_of_all_waits_for_no_part_and_steps_on_none(tmp_path):
    m, out = trees.index(write_images(tmp_path / "d", 12, 16), processes=1), tmp_path / "p"
    shards.pack_share(pack.Images(m.path, pack.Encoding()), out, 0.01, 1, Share(0, 2))
    sleeper = "import sys, time; from hpc_lbsgd.owner import take; h = take(sys.argv[1]); print(1); time.sleep(60)"
    folder = shards.share_folder(out, Share(1, 2))
    job = subprocess.Popen([sys.executable, "-u", "-c", sleeper, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline().strip() == "1"
        with pytest.raises(RequestError, match="in use by process"):
            pack.pack(m.path, out, pack.Encoding(), 0.01, 1)
        assert folder.is_dir() and not (out / "manifest.arrow").exists()
    finally:
        job.kill()
        job.wait()
    assert len(pack.pack(m.path, out, pack.Encoding(), 0.01, 1)) == 12 and not (out / manifest.PARTS).exists()


def test_a_file_system_that_gives_a_part_is_asked_for_the_rest(root, tmp_path, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 100), at))
    assert len(archive.index(tar_of(root, tmp_path / "t.tar"), processes=1)) == 96
