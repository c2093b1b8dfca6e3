"""Shards: what they hold, who can read them, and what happens when a disk, a process or a bit fails."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from hpc_lbsgd.data import loader, manifest, pack, table, verify
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.pack import Encoding
from hpc_lbsgd.data.storage import Request, open_storage
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data

SMALL = Data(channels=1, image_size=16, augment="flip", eval_resize=0, mean=[0.0], std=[1.0])
SHARD_MB = 0.03  # some 15 of these pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return trees.index(write_images(tmp_path_factory.mktemp("source") / "d", 101, 16), processes=1)


KEEP = Encoding()


def packed(source, out, encoding=KEEP):
    return pack.pack(source.path, out, encoding, SHARD_MB, processes=1)


def pixels(m, kind):
    made = loader.create(SMALL.model_copy(update={"loader": kind}), m, 1, True, 16, 1, 2, True, torch.device("cpu"))
    return [
        (x.clone(), y.clone()) for x, y, _ in made.batches([Request(3, np.arange(0, 101, 7)), Request(4, np.arange(9))])
    ]


def test_every_byte_is_there_and_the_set_is_the_same(source, tmp_path):
    m = packed(source, tmp_path / "out")
    assert len(m.shards) > 3 and m.fingerprint == source.fingerprint and m.classes == source.classes
    here, there = open_storage(m), open_storage(source)
    for i in range(len(m)):
        assert bytes(here.read(i)) == bytes(there.read(i)) and m.key(i) == source.key(i)
    assert (m.labels == source.labels).all() and (m.widths == source.widths).all()
    assert (tmp_path / "out/classes.txt").read_text().split() == m.classes
    assert not (tmp_path / "out/.parts").exists()


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_folder_tar_and_raw_make_the_same_pictures(source, tmp_path, kind):
    tar, raw = packed(source, tmp_path / "tar"), packed(source, tmp_path / "raw", Encoding("raw", channels=1))
    expected = pixels(source, kind)
    for m in (tar, raw):
        for (x, y), (a, b) in zip(pixels(m, kind), expected, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_raw_colour_pictures_of_many_sizes_are_cropped_and_resized(tmp_path, kind):
    rng = np.random.default_rng(1)
    for i in range(6):
        (tmp_path / "d" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((60 + 9 * i, 90 - 7 * i), Image.Resampling.BICUBIC).save(
            tmp_path / "d" / f"c{i % 2}" / f"{i}.png"
        )
    m = trees.index(tmp_path / "d", processes=1)
    raw = pack.pack(m.path, tmp_path / "raw", Encoding("raw"), 1.0, 1)
    data = Data(image_size=32, loader=kind)
    both = []
    for each in (m, raw):
        made = loader.create(data, each, 1, True, 6, 1, 2, True, torch.device("cpu"))
        both.append([x.clone() for x, _, _ in made.batches([Request(0, np.arange(6))])])
    assert torch.equal(*(b[0] for b in both))
    small = pack.pack(m.path, tmp_path / "small", Encoding("raw", short_side=48), 1.0, 1)
    assert (np.minimum(small.widths, small.heights) == 48).all()
    with pytest.raises(RequestError, match="data.channels = 1.*packed raw with 3"):
        loader.check_sizes(Data(channels=1, mean=[0.0], std=[1.0]), raw, True)


def test_jpeg_is_scaled_and_indexed_as_what_it_is(source, tmp_path):
    m = packed(source, tmp_path / "out", Encoding("jpeg", short_side=8, quality=80, channels=1))
    assert set(m.widths) == {8} and m.fingerprint != source.fingerprint and m.key(0).endswith(".jpg")
    assert not verify.verify(tmp_path / "out", processes=1).findings


def test_webdataset_reads_our_shards(source, tmp_path):
    import webdataset

    for name, encoding in (("tar", Encoding()), ("raw", Encoding("raw", channels=1))):
        m = packed(source, tmp_path / name, encoding)
        urls = [str(m.root / s["name"]) for s in m.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("l8"))
        assert len(samples) == len(source)
        for i in (0, 50, 100):
            with Image.open(source.file(i)) as image:
                expected = np.asarray(image)
            found = samples[i]["png" if name == "tar" else "npy"]
            assert (np.asarray(found).reshape(16, 16) == expected).all() and samples[i]["cls"] == source.labels[i]


def test_a_killed_pack_goes_on_where_it_was(source, tmp_path):
    out = tmp_path / "out"
    job = subprocess.Popen([sys.executable, "-m", "hpc_lbsgd.cli", "data", "pack", str(source.path), str(out),
                            "--shard-mb", str(SHARD_MB), "--processes", "1"], start_new_session=True)  # fmt: skip
    end = time.monotonic() + 60
    while not list(out.glob(".parts/*.arrow")) and time.monotonic() < end:
        time.sleep(0.001)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    whole = {
        p: p.stat().st_mtime_ns for p in out.glob("shard-*.tar") if (out / ".parts" / f"{p.stem[6:]}.arrow").exists()
    }
    assert whole
    if not (out / "manifest.arrow").exists():  # it may have been quick
        with pytest.raises(RequestError, match="no manifest.arrow"):
            find(out)
    m = packed(source, out)
    assert {p: p.stat().st_mtime_ns for p in whole} == whole
    assert not verify.verify(out, processes=1).findings and len(m) == 101
    assert not list(out.glob(".shard*"))


def test_of_two_packs_into_one_folder_at_the_same_time_one_goes_on(source, tmp_path):
    words = [sys.executable, "-m", "hpc_lbsgd.cli", "data", "pack", str(source.path), str(tmp_path / "p")]
    jobs = [subprocess.Popen([*words, "--shard-mb", mb, "--processes", "1"], stderr=subprocess.PIPE, text=True)
            for mb in ("0.002", "0.003")]  # fmt: skip
    said = [job.communicate(timeout=120)[1] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 2], said
    refused = said[[job.returncode for job in jobs].index(2)]
    assert "in use by process" in refused or "was begun there" in refused or "is packed there already" in refused
    packed = manifest.Manifest(tmp_path / "p" / "manifest.arrow")
    assert not verify.verify(packed.path, processes=1).findings
    left = {"classes.txt", "manifest.arrow", *(s["name"] for s in packed.shards)}
    assert set(os.listdir(tmp_path / "p")) == left


def test_half_written_shards_are_written_again(source, tmp_path):
    m = packed(source, tmp_path / "out")
    again = tmp_path / "again"
    (again / ".parts").mkdir(parents=True)
    request = m.header["packed"]
    (again / ".parts/request.json").write_text(json.dumps(request))
    shutil.copy(m.root / m.shards[0]["name"], again)  # a shard without its part: not known to be whole
    with open(again / m.shards[0]["name"], "r+b") as f:
        f.truncate(1000)
    assert not verify.verify(packed(source, again).path, processes=1).findings


def test_other_options_or_another_set_are_refused(source, tmp_path):
    packed(source, tmp_path / "out")
    assert packed(source, tmp_path / "out").fingerprint == source.fingerprint  # the same again: nothing to do
    with pytest.raises(RequestError, match="another set is packed there"):
        packed(source, tmp_path / "out", Encoding("raw", channels=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="is not empty"):
        packed(source, tmp_path / "mine")
    with pytest.raises(RequestError, match="say --jpeg or --raw"):
        Encoding("keep", short_side=10)


def test_a_full_disk_is_said_and_nothing_half_is_left(source, tmp_path):
    """A limit on file size stands in for a disk that is full in the middle of a shard."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        "from hpc_lbsgd.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["data", "pack", source.path, tmp_path / "out", "--shard-mb", SHARD_MB, "--processes", "1"]
    job = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=60)
    assert job.returncode == 1 and "cannot write" in job.stderr and "shard-000000.tar" in job.stderr
    assert "Traceback" not in job.stderr
    assert not list((tmp_path / "out").glob("*.tar")) and not (tmp_path / "out/manifest.arrow").exists()
    assert len(packed(source, tmp_path / "out")) == 101


def test_damaged_shards_are_found_and_named(source, tmp_path):
    m = packed(source, tmp_path / "out")
    first, second = (m.root / s["name"] for s in m.shards[:2])
    with open(first, "r+b") as f:  # one bit
        f.seek(int(m.offsets[2]) + 40)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 4]))
    found = verify.verify(m.path, processes=1).findings
    assert [(f.path, f.kind) for f in found] == [(m.key(2), "changed")]
    os.truncate(second, second.stat().st_size - 1)
    with pytest.raises(RequestError, match=f"{second.name}: {second.stat().st_size} bytes, the manifest says"):
        m.check_files()
    second.unlink()
    with pytest.raises(RequestError, match=f"{second.name}: missing"):
        m.check_files()
    sample = int(np.flatnonzero(m.shard_of == 1)[0])
    with pytest.raises(RunError, match=f"{second.name}:{m.key(sample)}"):
        open_storage(m).read(sample)


def test_an_image_that_changed_is_not_packed(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source.root, copy)
    m = manifest.Manifest(copy / "manifest.arrow")
    with open(m.file(5), "r+b") as f:
        f.seek(30)
        f.write(b"\xff")
    with pytest.raises(RunError, match=f"{m.key(5)} changed since it was indexed"):
        packed(m, tmp_path / "out")


def test_members_are_only_what_they_should_be(source, tmp_path):
    m = packed(source, tmp_path / "out")
    again = packed(source, tmp_path / "again")
    for shard in m.shards:
        with tarfile.open(m.root / shard["name"]) as tar:
            assert all(x.isreg() and x.mtime == 0 and x.uid == 0 and "/" not in x.name for x in tar)
        assert (m.root / shard["name"]).read_bytes() == (again.root / shard["name"]).read_bytes()


def test_more_shards_than_open_files_allowed(source, tmp_path):
    m = packed(source, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (260, hard))
        assert len(open_storage(m).read(100)) > 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= len(m.shards) + 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_ranks_share_a_packed_sets_manifest(source, tmp_path):
    """Its columns are views of the mapped file, however many shards there are: no rank holds its own."""
    m = packed(source, tmp_path / "out")
    assert len(m.shards) > 3 and m.header["decoders"] == source.header["decoders"]
    for name in m.table.schema.names:
        assert m.table.column(name).num_chunks == 1, name
    mapped = m.table.column("label").chunk(0).buffers()[1].address
    assert m.labels.ctypes.data == mapped + 4 * m.table.column("label").chunk(0).offset


def test_shards_have_names_that_others_read_whatever_files_were_called(source, tmp_path):
    """A table may name any file; a tar's name has 100 bytes, and KEY.cls is the class."""
    image = bytes(open_storage(source).read(0))
    called = ["a.png", "b." + "x" * 150, "c", "d.cls", "e.json", "f.p g"]
    for name in called:
        (tmp_path / name).write_bytes(image)
    (tmp_path / "t.csv").write_text("path,class,x\n" + "".join(f"{name},cat,1\n" for name in called))
    m = table.index(tmp_path / "t.csv", processes=1)
    keep = packed(m, tmp_path / "keep")
    assert keep.fingerprint == m.fingerprint and [keep.key(i) for i in range(6)] == called
    assert not verify.verify(keep.path, 1).unusable
    with tarfile.open(keep.root / keep.shards[0]["name"]) as tar:
        inside = tar.getnames()
    assert len(inside) == len(set(inside)) == 18 and inside[:6:3] == ["000000000.png", "000000001.bin"]
