"""ILSVRC and Tiny-ImageNet are read as they are shipped."""

import io
import json
import tarfile

import numpy as np
import pytest
from conftest import command
from PIL import Image
from test_archive import add

from hpc_lbsgd.data import archive
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.errors import RequestError

WNIDS = ["n01440764", "n01443537", "n02119789", "n07697313"]
DEVKIT = {1: WNIDS[2], 2: WNIDS[3], 3: WNIDS[0], 4: WNIDS[1]}  # numbers of their own, as ILSVRC's devkit has them
TRUTH = [3, 1, 4, 2, 2, 3]


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def ilsvrc(tmp_path):
    """Training images as a tar of tars, validation images in one flat tar and in one flat folder, the list of truth."""
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for c, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as one:
                for i in range(2):
                    add(one, f"{wnid}_{i}.JPEG", picture(10 * c + i))
            add(tar, f"{wnid}.tar", inner.getvalue())
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i in np.random.default_rng(0).permutation(len(TRUTH)):  # tars are in no order
            name = f"ILSVRC2012_val_{i + 1:08d}.JPEG"
            add(tar, name, picture(100 + i))
            (tmp_path / "val" / name).write_bytes(picture(100 + i))
    (tmp_path / "truth.txt").write_text("".join(f"{n}\n" for n in TRUTH))
    return tmp_path


def check(m, train) -> None:
    assert m.classes == train.classes == WNIDS
    expected = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": DEVKIT[n] for i, n in enumerate(TRUTH)}
    assert {m.key(i): m.classes[m.labels[i]] for i in range(len(m))} == expected


TABLES = ["".join(f"{n} {w} some words\n" for n, w in DEVKIT.items()),
          "".join(f"{w} {n} kit_fox\n" for n, w in DEVKIT.items()),
          "id,wnid\n" + "".join(f"{n},{w}\n" for n, w in DEVKIT.items())]  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_ilsvrcs_list_of_numbers(ilsvrc, table):
    train = archive.index(ilsvrc / "train.tar", processes=1)
    (ilsvrc / "ids.txt").write_text(table)
    options = {"processes": 1, "table": ilsvrc / "truth.txt", "classes": train.classes, "ids": ilsvrc / "ids.txt"}
    check(archive.index(ilsvrc / "val.tar", **options), train)
    check(trees.index(ilsvrc / "val", **options), train)


def test_the_devkits_meta_mat_beside_the_list(ilsvrc):
    scipy = pytest.importorskip("scipy.io")
    fields = ("ILSVRC2012_ID", "WNID", "words", "num_children", "children")
    synsets = np.zeros(5, [(f, object) for f in fields])
    for i, (number, wnid) in enumerate([*DEVKIT.items(), (1001, "n00001740")]):  # an inner node of the hierarchy too
        synsets[i] = (float(number), wnid, "kit fox", 0.0 if number < 5 else 4.0, np.zeros((0, 0)))
    scipy.savemat(ilsvrc / "meta.mat", {"synsets": synsets.reshape(-1, 1)}, do_compression=True)
    train = archive.index(ilsvrc / "train.tar", processes=1)
    words = ("--labels", ilsvrc / "truth.txt", "--classes-of", ilsvrc / "train.arrow")
    job = command("data", "index", ilsvrc / "val.tar", *words)
    assert job.returncode == 0, job.stderr
    check(archive.Manifest(ilsvrc / "val.arrow"), train)
    (ilsvrc / "meta.mat").write_bytes(b"no MATLAB")
    with pytest.raises(RequestError, match="meta.mat: not the devkit's meta.mat"):
        trees.index(ilsvrc / "val", table=ilsvrc / "truth.txt")


@pytest.mark.parametrize("truth, ids, says", [
    (TRUTH, None, "has numbers alone, and no meta.mat is beside it"), (TRUTH[1:], TABLES[0], "5 lines for 6 images"),
    (TRUTH[1:] + [9], TABLES[0], "no class has the number 9"),
    (TRUTH, TABLES[0] + "1 n00000001\n", "the number 1 has two classes"), (TRUTH, "", "no class has the number 3"),
])  # fmt: skip
def test_lists_that_do_not_fit_are_refused(ilsvrc, truth, ids, says):
    (ilsvrc / "truth.txt").write_text("".join(f"{n}\n" for n in truth))
    if ids is not None:
        (ilsvrc / "ids.txt").write_text(ids)
    with pytest.raises(RequestError, match=says):
        trees.index(ilsvrc / "val", table=ilsvrc / "truth.txt", ids=ilsvrc / "ids.txt" if ids is not None else None)
    assert not (ilsvrc / "val" / "manifest.arrow").exists()


def test_tiny_imagenet_whole(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for c, wnid in enumerate(WNIDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(2):
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_bytes(picture(10 * c + i))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    for part in ("val", "test"):
        (root / part / "images").mkdir(parents=True)
        for i in range(3):
            (root / part / "images" / f"{part}_{i}.JPEG").write_bytes(picture(50 + i))
    truth = [WNIDS[3], WNIDS[1], WNIDS[3]]  # a part of the classes: numbers must be the training set's all the same
    rows = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(truth)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text("n01440764\ttench\n")
    job = command("data", "index", root, "--json")
    assert job.returncode == 0, job.stderr
    told = json.loads(job.stdout)["manifests"]
    assert [t["samples"] for t in told] == [8, 3]
    train, val = (trees.Manifest(root / part / "manifest.arrow") for part in ("train", "val"))
    assert train.classes == val.classes == WNIDS
    assert sorted(val.classes[n] for n in val.labels) == sorted(truth)
