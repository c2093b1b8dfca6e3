"""Which class a sample gets, and what is said of files that are none."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from conftest import command, write_images
from test_archive import add

from hpc_lbsgd.data import archive, labels, manifest, pack, verify
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.loader import open_set
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import open_storage
from hpc_lbsgd.errors import RequestError


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("one") / "d", 1, 16, classes=1)
    return next(root.rglob("*.png")).read_bytes()


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            add(tar, name, data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("layout", ["{c}/{i}.png", "{c}/images/{i}.png", "{c}/a/{i}.png", "{c}/{i}/x.png"])
@pytest.mark.parametrize("classes", [["cat", "dog"], ["9", "10"], ["10", "9", "cat"]])
def test_a_folder_and_a_tar_of_it_have_the_same_classes(layout, classes, image, tmp_path):
    for c in classes:
        for i in range(2):
            path = tmp_path / "set" / layout.format(c=c, i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    folder = trees.index(tmp_path / "set", processes=1)
    for inside in (".", "set", "some/where/set"):  # as people make tars: from within, and from above
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            tar.add(tmp_path / "set", inside, filter=lambda m: None if m.name.endswith(".arrow") else m)
        m = archive.index(tmp_path / "set.tar", processes=1)
        assert m.classes == folder.classes == sorted(classes)
        assert m.labels.tolist() == folder.labels.tolist()


TABLE = "name,class\na.png,great white shark\nb.png,tench\n"
BOXES = "a.png\tn01\t0\t32\t44\t62\nb.png\tn02\t52\t55\t57\t59\n"


@pytest.mark.parametrize("table, expected", [
    (TABLE, ["great white shark", "tench"]), (BOXES, ["n01", "n02"]),
    ("a.png cat\nb.png big dog\n", ["cat", "big dog"]),
    ("a,n01 1 2 3 4 n01 5 6 7 8\nb,n02 1 2 3 4\n", ["n01", "n02"]), ("a.png 1\nb.png 0\n", ["1", "0"]),
])  # fmt: skip
def test_tables_of_labels_for_folders_and_tars(table, expected, image, tmp_path):
    flat = tmp_path / "val" / "images"
    flat.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (flat / name).write_bytes(image)
    (tmp_path / "labels.txt").write_text(table)
    tar = tar_of(tmp_path / "val.tar", {"images/a.png": image, "images/b.png": image})
    for m in (trees.index(tmp_path / "val", processes=1, table=tmp_path / "labels.txt"),
              archive.index(tar, processes=1, table=tmp_path / "labels.txt")):  # fmt: skip
        assert {os.path.basename(m.key(i)): m.classes[m.labels[i]] for i in range(2)} == dict(
            zip(("a.png", "b.png"), expected, strict=True)
        )
    (tmp_path / "val" / trees.ANNOTATIONS).write_text(BOXES)  # as Tiny-ImageNet is shipped
    (tmp_path / "val" / trees.ANNOTATIONS).write_text("\ufeff" + BOXES)  # and as other systems save it
    job = command("data", "index", tmp_path / "val", "--json")
    assert json.loads(job.stdout)["manifests"][0]["classes"] == ["n01", "n02"], job.stderr
    (tmp_path / "labels.txt").write_text("a.png cat\n")
    with pytest.raises(RequestError, match=r"1 images in .* have no line in .*labels.txt:\n  images/b.png"):
        trees.index(tmp_path / "val", processes=1, table=tmp_path / "labels.txt")


def test_a_webdatasets_other_fields_are_no_images(image, tmp_path):
    files = {f"{i}{s}": d for i in range(3) for s, d in ((".png", image), (".seg.png", image), (".cls", str(i)))}
    m = archive.index(tar_of(tmp_path / "set.tar", files), processes=1)
    assert len(m) == 3 and m.header["left_out"] == {".seg.png beside an image": 3}
    dots = {f"v1.{i}.png": image for i in range(3)} | {f"v1.{i}.cls": "0" for i in range(3)}
    assert len(archive.index(tar_of(tmp_path / "dots.tar", dots), processes=1)) == 3


@pytest.mark.parametrize("files, says", [
    ({"a.cls": "3", "a.json": '{"label": 5}'}, r"a.png: .cls says '3', .json says '5'"),
    ({"a.cls": "-1"}, "a label is -1"), ({"a.cls": "1000000000000"}, "a label is 1000000000000"),
    ({"a.cls": "0", "b.png": None, "b.cls": "cat"}, "labels are numbers and names: 'cat' beside '0'"),
    ({"a.jpg": None, "a.cls": "0"}, "a sample has several images"),
    ({"a.txt": "a photo of a cat"}, "1 images have no label"), ({"a.cls": ""}, "1 images have no label"),
    ({"a.json": '{"label": null}'}, "no label"), ({"a.json": '{"label": [1, 2]}'}, "no label"),
    ({"a.cls": "1" * 5000}, "a label is 11111"),
])  # fmt: skip
def test_labels_that_cannot_be_meant_are_refused(files, says, image, tmp_path):
    files = {"a.png": image} | {name: image if data is None else data for name, data in files.items()}
    with pytest.raises(RequestError, match=says):
        archive.index(tar_of(tmp_path / "set.tar", files), processes=1)
    assert not (tmp_path / "set.arrow").exists()


def test_what_looks_misread_is_said(image, tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(image)
    job = command("data", "index", tmp_path / "d")
    assert job.returncode == 0 and "WARNING: classes named train, val: is this a folder of parts" in job.stdout
    assert "1 of 2 classes with a single image: val" in job.stdout and "2 classes (train, val)" in job.stdout
    assert labels.doubts(["cat"], [0, 0]) == ["one class, 'cat': expected DIR/CLASS/IMAGE"]
    assert labels.doubts(["a", "b"], [0, 0, 1, 1]) == []
    assert "1 of 3 classes without an image: c" in labels.doubts(["a", "b", "c"], [0, 0, 1, 1])[0]


def test_nothing_is_left_out_in_silence(image, tmp_path):
    root = tmp_path / "d"
    write_images(root, 4, 16, classes=2)
    for name in ("class-0/moves.gif", "class-0/new.jp2", "class-1/README", "class-1/deep/note.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "loose.png").write_bytes(image)
    other = write_images(tmp_path / "elsewhere", 3, 16, classes=1) / "class-0"
    (root / "class-2").symlink_to(other)  # a class on another disk
    (root / "class-0" / "again").symlink_to(other)
    job = command("data", "index", root)
    assert job.returncode == 0, job.stderr
    for said in ("1 .gif", "1 .jp2", "1 no suffix", "1 .txt", "1 images beside the class folders",
                 "1 linked folder class-0/again"):  # fmt: skip
        assert said in job.stdout
    assert len(Manifest(root / "manifest.arrow")) == 7


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root reads everything; no setpriv")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    import subprocess
    import sys

    root = write_images(tmp_path / "d", 4, 16, classes=2)
    closed = root / "class-1" / "closed"
    closed.mkdir(mode=0)
    words = [
        sys.executable,
        "-c",
        "import sys; from hpc_lbsgd.data import tree; tree.scan(tree.Path(sys.argv[1]))",
        root,
    ]
    if os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.parents):
            if path.stat().st_uid == 0 and path != path.parent and str(path).startswith("/tmp/"):
                path.chmod(0o755)
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *words]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0 and f"{closed}: cannot be read" in ended.stderr, ended.stderr


NAMES = [
    b"new\nline.png",
    b"a\ttab.png",
    b"latin-\xe9.png",
    b"back\\slash.png",
    b"\\xe9.png",
    b'"quoted.png',
    "ünï.png".encode(),
]


@pytest.mark.parametrize("packed", [False, True])
def test_files_may_have_any_name(packed, image, tmp_path):
    """Indexed, read, packed, excluded and verified."""
    folder = tmp_path / "d" / "c"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes(image)
    (folder / "plain.png").write_bytes(image)
    m = trees.index(tmp_path / "d", processes=1)
    if packed:
        m = pack.pack(m.path, tmp_path / "p", pack.Encoding(), 1.0, 1)
    assert {os.fsencode(m.key(i)) for i in range(len(m))} == {b"c/" + n for n in [*NAMES, b"plain.png"]}
    assert all(bytes(open_storage(m).read(i)) == image for i in range(len(m)))
    assert not verify.verify(m.path, processes=1).unusable
    for name in NAMES:
        if packed:
            break
        (folder / os.fsdecode(name)).write_bytes(b"broken")
    if packed:
        m = trees.add_excluded(
            m.path.parent / "exclude.txt", [("c/" + os.fsdecode(n), "bad") for n in NAMES]
        ) and Manifest(m.path)
    else:
        job = command("data", "verify", m.path, "--exclude")
        assert job.returncode == 0, job.stderr
        m = Manifest(m.path)
    assert [m.key(i) for i in range(len(m))] == ["c/plain.png"]


def test_a_bad_image_of_any_name_can_be_left_out(image, tmp_path):
    root = tmp_path / "d" / "c"
    root.mkdir(parents=True)
    (root / "good.png").write_bytes(image)
    (root / os.fsdecode(b"bad\xff.png")).write_bytes(b"garbage")
    for _ in range(2):
        job = command("data", "index", tmp_path / "d", "--exclude")
        assert job.returncode == 0, job.stderr
    assert len(Manifest(tmp_path / "d" / "manifest.arrow")) == 1
    (root / os.fsdecode(b"late\xff.png")).write_bytes(image)
    m = trees.index(tmp_path / "d", processes=1)
    part = manifest.subset(m, tmp_path / "d" / "part.arrow", 2)
    part.check_files()
    assert [part.key(i) for i in range(2)] == [m.key(i) for i in range(2)]


def test_a_set_with_nothing_left_and_one_with_labels_that_no_class_has(tmp_path):
    root = write_images(tmp_path / "d", 4, 16, classes=2)
    m = trees.index(root, processes=1)
    table = m.table.set_column(1, "label", [[0, 0, 1, 7]]).cast(m.table.schema)
    import pyarrow as pa

    with pa.OSFile(str(tmp_path / "edited.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    job = command("data", "verify", tmp_path / "edited.arrow")
    assert job.returncode == 2 and "a label is 7, and there are 2 classes" in job.stderr
    with pytest.raises(RequestError, match="a label is 7"):
        open_set(None, tmp_path / "edited.arrow").check_files()
    (root / "exclude.txt").write_text("".join(f"{m.key(i)}\n" for i in range(4)))
    with pytest.raises(RequestError, match="no images are left to be indexed"):
        trees.index(root, processes=1)


def test_verify_sees_what_staging_refuses(image, tmp_path):
    """A label's file, or a tar's header: in no sample, and in a checksum of the whole."""
    root = write_images(tmp_path / "d", 12, 16)
    m = pack.pack(trees.index(root, processes=1).path, tmp_path / "p", pack.Encoding(), 1.0, 1)
    shard = m.root / m.shards[0]["name"]
    content = bytearray(shard.read_bytes())
    content[content.index(b".cls") + 1024] ^= 1
    shard.write_bytes(content)
    job = command("data", "verify", m.path)
    assert job.returncode == 1 and f"shard      {shard.name}: not the bytes that were packed" in job.stdout, job.stdout
    files = {f"c{i % 2}/{i}.png": image for i in range(6)}
    tar = tar_of(tmp_path / "set.tar", files)
    archive.index(tar, processes=1)
    whole = bytearray(tar.read_bytes())
    whole[whole.index(b"c0/4.png")] ^= 1
    tar.write_bytes(whole)
    job = command("data", "verify", tmp_path / "set.arrow")
    assert job.returncode == 1 and "shard      set.tar" in job.stdout and "from byte" in job.stdout, job.stdout


def test_a_pack_under_way_is_not_indexed(tmp_path, image):
    tar_of(tmp_path / "shard-000000.tar", {"1.png": image, "1.cls": "0"})
    (tmp_path / ".parts").mkdir()
    with pytest.raises(RequestError, match="a pack is under way there, or was ended"):
        archive.index(tmp_path)


def test_folders_below_what_all_share():
    assert labels.of_folders(["t/a/1", "t/b/x/2"]) == ["a", "b"]
    assert labels.of_folders(["a/1", "a/2"]) == ["a", "a"] and labels.of_folders(["1"]) == [None]
    assert labels.of_folders(["t/a/1", "t/2"]) == ["t", "t"]
    assert labels.of_folders([]) == [] and np.array_equal(labels.of_folders(["t/s/a/1", "t/s/b/1"]), ["a", "b"])


@pytest.mark.parametrize("names, says", [
    ([f"img{i}.png" for i in range(1, 12)], "img11.png comes before img2.png by its letters"),
    (["x/1.png", "y/1.png", "x/2.png"], "x/1.png and y/1.png have one name"),
    ([f"val_{i:04d}.png" for i in range(9, 12)], None),
    (["a-1.png", "a1.png", "b.png"], None),
])  # fmt: skip
def test_a_list_of_numbers_needs_names_whose_order_is_one(names, says, image, tmp_path):
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(image)
    numbers = range(len(names))
    (tmp_path / "numbers.txt").write_text("".join(f"{i}\n" for i in numbers))
    (tmp_path / "ids.txt").write_text("".join(f"{i} class{i:02d}\n" for i in numbers))
    asked = {"processes": 1, "table": tmp_path / "numbers.txt", "ids": tmp_path / "ids.txt"}
    if says:
        with pytest.raises(RequestError, match=says):
            trees.index(tmp_path / "d", **asked)
        return
    m = trees.index(tmp_path / "d", **asked)
    assert [(m.key(i), m.classes[m.labels[i]]) for i in numbers] == [(n, f"class{i:02d}") for i, n in enumerate(names)]


def test_classes_may_have_any_name_that_a_folder_can_have(image, tmp_path):
    """Packed, and the shards indexed by themselves, as others would read them."""
    names = [
        os.fsdecode(name) for name in (b"a\nb", b"caf\xe9", b'"c"', "d\u2028e".encode(), b"f\tg", b"plain", b"z\r")
    ]
    for name in names:
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "1.png").write_bytes(image)
    whole = trees.index(tmp_path / "d", processes=1)
    packed = pack.pack(whole.path, tmp_path / "p", pack.Encoding(), 1.0, 1)
    assert packed.classes == whole.classes == sorted(names)
    (tmp_path / "p" / "manifest.arrow").unlink()
    again = archive.index(tmp_path / "p", processes=1)
    assert again.classes == whole.classes and again.labels.tolist() == whole.labels.tolist()
    (tmp_path / "p" / "classes.txt").write_bytes(b'\xef\xbb\xbfone\r\n"two\n' + b"n\n" * 5)
    assert archive.index(tmp_path / "p", processes=1).classes[:2] == ["one", '"two']


def test_a_class_that_is_a_link_to_what_holds_the_set_is_refused(image, tmp_path):
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "1.png").write_bytes(image)
    for target in (".", ".."):
        (tmp_path / "d" / "up").symlink_to(target)
        with pytest.raises(RequestError, match="up: is a link to .* which holds .* itself"):
            trees.index(tmp_path / "d", processes=1)
        (tmp_path / "d" / "up").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_bytes(image)
    (tmp_path / "d" / "b").symlink_to("../elsewhere")
    assert trees.index(tmp_path / "d", processes=1).classes == ["a", "b"]


def test_an_image_with_two_classes_is_refused(image, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(image)
    table = tmp_path / "labels.csv"
    table.write_text("a.png,cat\na.png,cat\n")
    assert trees.index(tmp_path / "d", processes=1, table=table).classes == ["cat"]
    table.write_text("a.png,cat\nb.png,cat\na.png,dog\n")
    with pytest.raises(RequestError, match="labels.csv: a.png has two classes, 'cat' and 'dog'"):
        trees.index(tmp_path / "d", processes=1, table=table)


def test_what_is_no_file_is_named_and_not_waited_for(image, tmp_path):
    folder = tmp_path / "d" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(image)
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    found = verify.verify(tmp_path / "d", processes=1)
    assert {(f.path, f.kind) for f in found.unusable} == {(f"cat/{n}.png", "missing") for n in ("pipe", "endless")}
    with pytest.raises(RequestError, match="2 of 3 images cannot be read.*\n.*endless.png: is not a regular file"):
        trees.index(tmp_path / "d", processes=1)
    assert len(trees.index(tmp_path / "d", processes=1, exclude=True)) == 1


def test_classes_in_other_encodings_stay_apart(image, tmp_path):
    files = {
        "a.png": image,
        "a.cls": b"caf\xe9",
        "b.png": image,
        "b.cls": b"caf\xe8",
        "c.png": image,
        "c.cls": b"\xef\xbb\xbftea",
    }
    m = archive.index(tar_of(tmp_path / "set.tar", files), processes=1)
    assert m.classes == sorted([os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), "tea"])  # as folders of those names
    assert sorted(m.labels.tolist()) == [0, 1, 2]


def test_an_archive_beside_an_index_does_no_harm(image, tmp_path):
    write_images(tmp_path / "d", 4, 8)
    m = trees.index(tmp_path / "d", processes=1)
    (tmp_path / "d" / "devkit.tar.gz").write_bytes(b"of something else")
    assert find(tmp_path / "d") == m.path
    m.path.unlink()
    with pytest.raises(RequestError, match="devkit.tar.gz is compressed"):
        find(tmp_path / "d")
