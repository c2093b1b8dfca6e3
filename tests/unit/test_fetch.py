"""Sets by name: CIFAR-10 from its authors' archive, and from what is none."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from hpc_lbsgd.data import fetch
from hpc_lbsgd.errors import RequestError, RunError

COUNT = 20  # records a file, for 10,000


def archive(path, count=COUNT, label=None):
    """(the archive, images (N, H, W, C) of the first file)."""
    rng = np.random.default_rng(0)
    first = None
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "readme.html"]:
            images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            first = images if first is None else first
            labels = (np.arange(count) % 10 if label is None else np.full(count, label)).astype(np.uint8)
            content = np.concatenate(
                [labels[:, None], images.transpose(0, 3, 1, 2).reshape(count, -1)], axis=1
            ).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path, first


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fetch, "CIFAR_RECORDS", COUNT)


def test_cifar10_from_its_archive_or_its_folder(tmp_path):
    source, first = archive(tmp_path / "cifar-10-binary.tar.gz")
    train, test = fetch.cifar10(tmp_path / "out", source)
    assert (len(train), len(test)) == (100, 20) and train.classes == test.classes == list(fetch.CIFAR_CLASSES)
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "train" / "frog" / "00016.png")), first[16])
    with tarfile.open(source) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    again = fetch.cifar10(tmp_path / "again", tmp_path / "unpacked")
    assert [m.fingerprint for m in again] == [train.fingerprint, test.fingerprint]


@pytest.mark.parametrize("kind", ["a text", "half of it", "other records", "another set", "a folder without"])
def test_what_is_not_cifar10_is_refused_and_leaves_nothing(tmp_path, kind):
    source = tmp_path / "cifar-10-binary.tar.gz"
    if kind == "a text":
        source.write_text("none")
    elif kind == "half of it":
        archive(source)
        source.write_bytes(source.read_bytes()[:100_000])
    elif kind == "a folder without":
        source.mkdir()
    else:
        archive(source, count=COUNT - (kind == "other records"), label=99 if kind == "another set" else None)
    with pytest.raises(RequestError, match=r"--source|expected"):
        fetch.cifar10(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_a_download_is_verified(tmp_path, monkeypatch):
    source, _ = archive(tmp_path / "cifar-10-binary.tar.gz")
    (tmp_path / "scratch").mkdir()
    with pytest.raises(RunError, match="MD5 is .*, expected c32a"):
        fetch.download(source.as_uri(), fetch.CIFAR_MD5, tmp_path / "scratch")
    with pytest.raises(RunError, match="--source"):
        fetch.download((tmp_path / "nothing").as_uri(), fetch.CIFAR_MD5, tmp_path / "scratch")


def test_a_part_that_another_process_wrote_meanwhile_is_taken(tmp_path):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2
    found = [fetch.write_part(tmp_path / "train", ("a", "b"), images, labels) for _ in range(2)]
    assert len(found[0]) == len(found[1]) == 4 and [p.name for p in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("content, suffix", [
    (b"", ""), (b"\0\0", ""), (b"\0\0\x08\x03\0\0\0\x05" + bytes(20), ""), (b"junk", ".gz"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", ".gz"), (gzip.compress(bytes(5000), mtime=0)[:30], ".gz"),
])  # fmt: skip
def test_what_is_not_mnists_format_is_refused_by_name(tmp_path, content, suffix):
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (tmp_path / f"{part}-{kind}{suffix}").write_bytes(content)
    with pytest.raises(RequestError, match="train-images-idx3-ubyte.*: not a whole IDX file"):
        fetch.fashion_mnist(tmp_path / "out", tmp_path)


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.tree, "index", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch.write_part(tmp_path / "train", ("a", "b"), np.zeros((4, 8, 8), np.uint8), np.arange(4) % 2)
    assert list(tmp_path.iterdir()) == []
