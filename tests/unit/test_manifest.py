"""Indexing real files: what is found, and what is refused by name."""

import os

import numpy as np
import pytest
from conftest import write_images

from hpc_lbsgd.data import fetch, manifest
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.find import find
from hpc_lbsgd.errors import RequestError


@pytest.fixture
def tree(tmp_path):
    return write_images(tmp_path / "set", 12, 16)


def test_rows_say_what_the_files_are(tree):
    m = trees.index(tree, processes=1)
    assert len(m) == 12 and m.classes == [f"class-{i}" for i in range(4)]
    assert m.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert set(m.widths) == set(m.heights) == {16}
    for i in range(12):
        assert os.path.getsize(m.file(i)) == m.sizes[i]
    m.check_files()


def test_same_files_same_fingerprint_wherever_they_lie(tree, tmp_path):
    first = trees.index(tree, processes=1).fingerprint
    tree.rename(tmp_path / "moved")
    again = trees.index(tmp_path / "moved", tmp_path / "apart.arrow", processes=2)
    assert again.fingerprint == first
    assert os.path.exists(again.file(0))


def test_fingerprint_sees_one_changed_pixel(tree):
    first = trees.index(tree, processes=1).fingerprint
    target = tree / "class-0" / "0000.png"
    from PIL import Image

    image = Image.open(target)
    image.putpixel((3, 3), (image.getpixel((3, 3)) + 1) % 256)
    image.save(target)
    assert trees.index(tree, processes=1).fingerprint != first


def test_missing_folder_and_empty_class_are_named(tree):
    with pytest.raises(RequestError, match="nowhere: no such folder"):
        trees.index(tree / "nowhere")
    (tree / "class-9").mkdir()
    with pytest.raises(RequestError, match="class 'class-9' has no images"):
        trees.index(tree)
    with pytest.raises(RequestError, match="no class folders"):
        trees.index(tree / "class-0")


def test_unreadable_images_are_listed_by_name(tree):
    whole = (tree / "class-1" / "0001.png").read_bytes()
    (tree / "class-1" / "0001.png").write_bytes(whole[: len(whole) // 2])
    (tree / "class-2" / "0002.png").write_bytes(b"")
    (tree / "class-3" / "0003.png").write_bytes(b"no picture at all")
    with pytest.raises(RequestError) as caught:
        trees.index(tree, processes=1)
    text = str(caught.value)
    assert "3 of 12 images" in text
    for name in ("class-1/0001.png", "class-2/0002.png: empty file", "class-3/0003.png"):
        assert name in text
    assert not (tree / manifest.FILE_NAME).exists()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
@pytest.mark.parametrize("cut", [1, 2, 5, 20, 100])
def test_any_truncation_is_found(tmp_path, suffix, cut):
    tree = write_images(tmp_path, 4, 24, suffix=suffix)
    trees.index(tree, processes=1)
    path = tree / "class-2" / f"0002{suffix}"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RequestError, match=f"1 of 4 images .*\n.*0002{suffix}"):
        trees.index(tree, processes=1)


def test_manifest_that_no_longer_matches(tree):
    m = trees.index(tree, processes=1)
    (tree / "class-0" / "0000.png").unlink()
    with open(tree / "class-1" / "0001.png", "ab") as f:
        f.write(b"x")
    with pytest.raises(RequestError) as caught:
        m.check_files()
    assert "0000.png: missing" in str(caught.value)
    assert f"0001.png: {m.sizes[3] + 1} bytes, the manifest says {m.sizes[3]}" in str(caught.value)


def test_something_else_is_not_a_manifest(tree, tmp_path):
    (tmp_path / "x.arrow").write_bytes(b"not arrow")
    with pytest.raises(RequestError, match="x.arrow: not a manifest"):
        manifest.Manifest(tmp_path / "x.arrow")
    with pytest.raises(RequestError, match="no manifest.arrow; make one with"):
        find(tree)


def test_fashion_mnist_from_its_four_files(tmp_path, monkeypatch):
    """The IDX files of the real set, cut to a few images, become the same pixels as PNG."""
    import gzip

    from PIL import Image

    monkeypatch.setattr(fetch, "FASHION_PARTS", {"train": ("train", 30), "test": ("t10k", 20)})
    rng = np.random.default_rng(0)
    source = tmp_path / "idx"
    source.mkdir()
    images = {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        images[prefix] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        head = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">u4").tobytes()
        (source / f"{prefix}-images-idx3-ubyte").write_bytes(head + images[prefix].tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        with gzip.open(source / f"{prefix}-labels-idx1-ubyte.gz", "wb") as f:
            f.write(bytes([0, 0, 8, 1]) + np.array([count], ">u4").tobytes() + labels.tobytes())
    out = tmp_path / "out"
    train, test = fetch.fashion_mnist(out, source)
    assert (len(train), len(test)) == (30, 20)
    assert train.classes[0] == "0-t-shirt" and len(train.classes) == 10
    found = np.array(Image.open(out / "train" / "7-sneaker" / "00017.png"))
    assert np.array_equal(found, images["train"][17])
    assert fetch.fashion_mnist(out, tmp_path / "not needed")[0].fingerprint == train.fingerprint
    with pytest.raises(RequestError, match="no train-images-idx3-ubyte"):
        fetch.fashion_mnist(tmp_path / "other", out)
