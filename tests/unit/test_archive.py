"""Tar files indexed as they are: WebDatasets, ILSVRC's archives, and archives that mean harm."""

import io
import json
import tarfile

import numpy as np
import pytest
from conftest import command, write_images

from hpc_lbsgd.data import archive, manifest, names, verify
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.storage import open_storage
from hpc_lbsgd.errors import RequestError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return trees.index(write_images(tmp_path_factory.mktemp("tree") / "d", 41, 16, suffix=".jpg"), processes=1)


def add(tar, name, data, **changes):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def bytes_of(m, i):
    return bytes(open_storage(m).read(i))


def same_samples(m, tree):
    assert len(m) == len(tree)
    ours = sorted((int(m.labels[i]), bytes_of(m, i)) for i in range(len(m)))
    assert ours == sorted((int(tree.labels[i]), bytes_of(tree, i)) for i in range(len(tree)))


@pytest.mark.parametrize("label", ["number", "json"])
def test_a_webdataset_made_by_the_library(tree, tmp_path, label):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "set-%04d.tar"), maxcount=12, verbose=0) as sink:
        for i in range(len(tree)):
            sample = {"__key__": f"part/{i:05d}", "jpg": bytes_of(tree, i)}
            number = int(tree.labels[i])
            sample |= {"cls": number} if label == "number" else {"json": {"label": number, "note": "x"}}
            sink.write(sample)
    (tmp_path / "classes.txt").write_text("\n".join(tree.classes) + "\n")
    m = archive.index(tmp_path)
    assert len(m.shards) == 4 and m.classes == tree.classes
    same_samples(m, tree)
    assert not verify.verify(tmp_path, processes=1).findings


def test_training_images_as_ilsvrc_ships_them(tree, tmp_path):
    """One inner tar a class: the same data set, by its fingerprint, as the tree it unpacks to."""
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for label, name in enumerate(tree.classes):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for i in np.flatnonzero(tree.labels == label):
                    add(inner, tree.key(i).split("/")[1], bytes_of(tree, i))
            add(outer, f"{name}.tar", buffer.getvalue())
    m = archive.index(tmp_path / "train.tar")
    assert m.path == tmp_path / "train.arrow" and m.fingerprint == tree.fingerprint
    assert all(bytes_of(m, i) == bytes_of(tree, i) for i in range(len(m)))


def test_validation_images_with_a_table_of_labels(tree, tmp_path):
    flat = {f"val_{i:04d}.jpg": i for i in range(len(tree))}
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name, i in flat.items():
            add(tar, name, bytes_of(tree, i))
    with pytest.raises(RequestError, match="41 images have no label"):
        archive.index(tmp_path / "val.tar")
    rows = [f"{name[:-4]},{tree.classes[tree.labels[i]]} 1 2 3 4" for name, i in flat.items()]
    (tmp_path / "labels.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
    job = command("data", "index", tmp_path / "val.tar", "--labels", tmp_path / "labels.csv",
                  "--classes-of", tree.path, "--json")  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["manifests"][0]["classes"] == tree.classes
    same_samples(manifest.Manifest(tmp_path / "val.arrow"), tree)


@pytest.mark.parametrize("name, changes, says", [
    ("../outside.jpg", {}, "points outside"),
    ("a/../../outside.jpg", {}, "points outside"),
    ("/etc/outside.jpg", {}, "points outside"),
    ("a/link.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link to '/etc/passwd'"),
    ("a/hard.jpg", {"type": tarfile.LNKTYPE, "linkname": "a/1.jpg"}, "is a link"),
    ("a/fifo", {"type": tarfile.FIFOTYPE}, "neither a file nor a folder"),
])  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_members_that_mean_harm_are_refused(tree, tmp_path, name, changes, says, nested):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "a/1.jpg", bytes_of(tree, 0))
        add(tar, name, b"" if changes else b"x", **changes)
    path = tmp_path / "set.tar"
    if nested:
        with tarfile.open(path, "w") as outer:
            add(outer, "inner.tar", buffer.getvalue())
    else:
        path.write_bytes(buffer.getvalue())
    with pytest.raises(RequestError, match=says):
        archive.index(path)
    assert not (tmp_path / "set.arrow").exists()


@pytest.mark.parametrize("record", [None, b"99999999999999999999999 path=a/1.jpg\n"])
def test_what_is_not_a_whole_tar_is_said(tmp_path, record):
    """record: of an extended header, whose length is absurd."""
    if record:
        with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            add(tar, "PaxHeader", record, type=tarfile.XHDTYPE)
            add(tar, "a/1.jpg", b"x")
    else:
        (tmp_path / "set.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(RequestError, match="not a whole, uncompressed tar"):
        archive.index(tmp_path / "set.tar")


def test_images_that_do_not_decode_are_named_and_can_be_left_out(tree, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for i in range(4):
            add(tar, f"c{i % 2}/{i}.jpg", bytes_of(tree, i) if i != 2 else bytes_of(tree, i)[:100])
    with pytest.raises(RequestError, match="set.tar:c0/2.jpg"):
        archive.index(tmp_path / "set.tar")
    (tmp_path / names.EXCLUDE).write_text("c0/2.jpg\n")
    assert len(archive.index(tmp_path / "set.tar")) == 3


def sixty(tree, path, **changes):
    with tarfile.open(path, "w", **changes) as tar:
        for i in range(60):
            add(tar, f"c{i % 3}/{i:02d}.jpg", bytes_of(tree, i % len(tree)))
    return path.read_bytes()


@pytest.mark.parametrize("nested", [False, True])
def test_an_archive_is_whole_or_refused(tree, tmp_path, nested):
    """A bit flipped in any header, an archive cut anywhere, two archives joined: never a part of it in silence."""
    content = sixty(tree, tmp_path / "good.tar")
    starts = [m.offset - 512 for m in archive.members(tmp_path / "good.tar", 0)]
    assert len(starts) == 60

    def index(data):
        path = tmp_path / "set.tar"
        if nested:
            with tarfile.open(path, "w") as outer:
                add(outer, "inner.tar", data)
        else:
            path.write_bytes(data)
        return list(archive.members(path, 0))

    assert len(index(content)) == 60
    rng = np.random.default_rng(11)
    for start in rng.choice(starts, 20, replace=False):
        damaged = bytearray(content)
        damaged[start + int(rng.integers(0, 300))] ^= 1 << int(rng.integers(0, 7))
        with pytest.raises(RequestError, match=r"set\.tar.*(from byte \d+ on|not a whole)"):
            index(bytes(damaged))
    for cut in [*rng.integers(1, len(content) - 1, 20), starts[30], starts[-1], len(content.rstrip(b"\0")) + 100]:
        if len(content) - int(cut) > 9000:  # what is cut from the padding of end blocks is no loss
            with pytest.raises(RequestError, match=r"set\.tar.*(two end blocks|not a whole|more follows)"):
                index(content[: int(cut)])
    with pytest.raises(RequestError, match=r"from byte \d+ on \(a damaged header, or another archive joined"):
        index(content + content)
    assert len(index(content + bytes(4096))) == 60


def test_a_tar_is_read_as_its_folder_would_be(tree, tmp_path):
    """Made with ./ in front, with hidden files of editors and other systems, beside a file that is no label."""
    root = tmp_path / "d"
    for name in ("cat/1.jpg", "dog/2.jpg", "cat/.ipynb_checkpoints/1.jpg", ".cache/x.jpg", "dog/._2.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes_of(tree, 0))
    (root / "VERSION.txt").write_text("2")
    folder = trees.index(root, processes=1)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix != ".arrow"):
            tar.add(path, f"./{path.relative_to(root)}")
    m = archive.index(tmp_path / "d.tar", processes=1)
    assert m.classes == folder.classes == ["cat", "dog"] and m.fingerprint == folder.fingerprint


def test_what_a_tar_or_its_folder_hides_is_refused(tree, tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for i in (0, 1, 0):
            add(tar, f"c/{i}.jpg", bytes_of(tree, i))
    with pytest.raises(RequestError, match=r"holds c/0\.jpg twice"):
        archive.index(path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(bytes_of(tree, 0))
    with pytest.raises(RequestError, match=r"has tar files \(set\.tar\) and images \(cat/1\.jpg\)"):
        archive.index(tmp_path)
    import subprocess

    with open(tmp_path / "holes.bmp", "wb") as f:
        f.write(b"BM")
        f.seek(2**22)
        f.write(b"x")
    subprocess.run(["tar", "-S", "-cf", tmp_path / "holes.tar", "-C", tmp_path, "holes.bmp"], check=True)
    with pytest.raises(RequestError, match="stored with holes"):
        archive.index(tmp_path / "holes.tar")


@pytest.mark.parametrize("nested", [False, True])
def test_a_member_that_would_be_read_for_ever_is_refused(tree, tmp_path, nested):
    """Its size is less than nothing: what follows it would be itself."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a/1.jpg", bytes_of(tree, 0))
        add(tar, "notes.dat", b"")
    content = bytearray(buffer.getvalue())
    at = content.index(b"notes.dat")
    header = content[at : at + 512]
    header[124:136], header[148:156] = (-512).to_bytes(12, "big", signed=True), b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[at : at + 512] = header
    with tarfile.open(tmp_path / "set.tar", "w") as outer:
        add(outer, "inner.tar", bytes(content))
    if not nested:
        (tmp_path / "set.tar").write_bytes(content)
    with pytest.raises(RequestError, match="member 'notes.dat' says that it has -512 bytes"):
        archive.index(tmp_path / "set.tar", processes=1)
