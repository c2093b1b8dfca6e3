"""Masks: cut, turned, mirrored and scaled as their images, by both loaders, wherever they lie."""

import io
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hpc_lbsgd.data import archive, loader, masks, pack, stage, table, verify
from hpc_lbsgd.data.fields import NOWHERE, Field
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data, Train
from hpc_lbsgd.train import losses

N, CPU = 13, torch.device("cpu")
WHOLE = {"channels": 1, "mean": [0.0], "std": [1.0], "targets": ["mask"]}


def pair(rng, width, height, classes=3):
    """An image whose grey says its class, 40 times it, and its mask."""
    coarse = rng.integers(0, classes, (5, 4)).astype(np.uint8)
    mask = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
    return Image.fromarray(mask * 40), Image.fromarray(mask)


def write(root, sizes, orientation=None):
    (root / "i").mkdir(parents=True)
    (root / "m").mkdir()
    suffix = ".png" if orientation else ".bmp"
    rng, rows = np.random.default_rng(1), ["path,mask,x"]
    for i, size in enumerate(sizes):
        image, mask = pair(rng, *size)
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation[i]
        image.save(root / "i" / f"{i:02d}{suffix}", **{"exif": exif} if orientation else {})
        if i % 2:
            mask.putpalette(rng.integers(0, 256, 768).tolist())  # colours for people; their numbers are the classes
        mask.save(root / "m" / f"{i:02d}.png")
        rows.append(f"i/{i:02d}{suffix},m/{i:02d}.png,{i}")
    (root / "t.csv").write_text("\n".join(rows))
    return root / "t.csv"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return table.index(write(tmp_path_factory.mktemp("small"), [(16, 16)] * N), processes=1)


@pytest.fixture(scope="module")
def places(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    keep = pack.pack(small.path, root / "keep", pack.Encoding(), 0.01, 1)
    (root / "tars").mkdir()
    for shard in keep.shards:
        (root / "tars" / shard["name"]).symlink_to(keep.root / shard["name"])
    return {
        "folder": small,
        "keep": keep,
        "raw": pack.pack(small.path, root / "raw", pack.Encoding("raw", channels=1), 1, 1),
        "webdataset": archive.index(root / "tars", processes=1, wanted=["x", "mask"]),
        "staged": stage.stage(keep, root / "local"),
    }


def made(m, data, requests, train=True, **named):
    loading = loader.create(data, m, 3, train, 8, 2, 2, False, CPU, **named)
    return [(b.inputs[:, 0].clone(), b.labels) for b in loading.batches(requests)]


def test_a_mask_is_a_field_with_as_many_classes_as_it_has(places):
    for m in places.values():
        assert m.own_fields == {"x": Field("int"), "mask": Field("mask", 3)} and m.classes == []
        m.check_files()
    assert len({places[name].fingerprint for name in ("folder", "keep", "staged")}) == 1
    assert [places["keep"].key(i) for i in range(N)] == [f"i/{i:02d}.bmp" for i in range(N)]


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("augment", ["none", "flip", "pad-crop"])
def test_each_pixel_has_the_class_that_its_colour_says(places, kind, augment):
    data = Data(**WHOLE, loader=kind, augment=augment, image_size=16, crop_padding=3)
    requests = [Request(4, np.array(s)) for s in ([5, 0, 11, 3], [7])]
    first = None
    for m in places.values():
        for bound in (None, 1e-6):
            found = made(m, data, requests, prefetch_mb=bound)
            for images, mask in found:
                assert mask.dtype == torch.int64 and mask.shape == images.shape
                inside = mask != NOWHERE
                assert torch.equal(images[inside], 40.0 * mask[inside]) and (images[~inside] == 0).all()
            first = first or found
            assert all(
                torch.equal(a, b) for one, two in zip(first, found, strict=True) for a, b in zip(one, two, strict=True)
            )
    assert (first[0][1] == NOWHERE).any() == (augment == "pad-crop")


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("orientation", ["ignore", "apply"])
def test_photos_of_any_size_and_any_side_up(tmp_path, kind, orientation):
    """Scaled images are blurred where classes meet; elsewhere colours say the class, to the nearest pixel."""
    sizes = [(60, 40), (40, 60), (33, 90)] * 4
    m = table.index(write(tmp_path / "set", sizes, [1 + i % 8 for i in range(12)]), processes=1)
    upright = pack.pack(m.path, tmp_path / "up", pack.Encoding("raw", None, 50, 90, 1, True), 1, 1)
    data = Data(**WHOLE, loader=kind, image_size=32, eval_resize=36, orientation=orientation)
    for found, train in ((m, True), (m, False), (upright, True)):
        for images, mask in made(found, data, [Request(2, np.arange(8)), Request(2, np.arange(8, 12))], train):
            assert mask.shape == images.shape and mask.unique().tolist() == [0, 1, 2]
            assert ((images - 40.0 * mask).abs() < 20).float().mean() > 0.9
    assert upright.of_file("mask", "bytes").min() > 0 and not verify.verify(upright.path, 1).findings


def test_masks_that_are_none_are_named(tmp_path):
    path = write(tmp_path, [(16, 16)] * 8)
    pair(np.random.default_rng(0), 8, 16)[1].save(tmp_path / "m/01.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "m/02.png")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "m/03.png")
    (tmp_path / "m/04.png").unlink()
    (tmp_path / "m/05.png").write_bytes(b"none")
    with pytest.raises(RequestError) as caught:
        table.index(path, processes=1)
    for said in (
        "5 of 8 images",
        "i/01.bmp: mask is 8x16, and the image 16x16",
        "i/02.bmp: mask: has pixels of mode RGB, where a mask has one number of 8 bits",
        "i/03.bmp: mask: has pixels of mode I;16",
        "i/04.bmp: mask: [Errno 2] No such file",
        "i/05.bmp: mask: not an image",
    ):
        assert said in str(caught.value)
    m = table.index(path, processes=1, exclude=True)
    assert m.values("x").tolist() == [0, 6, 7]
    plain = table.index(write(tmp_path / "p", [(16, 16)] * 2), processes=1, wanted=["x"])
    assert list(plain.own_fields) == ["x"] and plain.header["left_out"] == {"column mask (not asked for)": 1}


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_a_mask_that_went_bad_is_found_and_stood_in_for(tmp_path, kind):
    m = table.index(write(tmp_path, [(16, 16)] * N), processes=1)
    bad = tmp_path / "m/03.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"\0" * len(whole))
    assert [f[:3] for f in verify.verify(m.path, 1).findings] == [
        ("i/03.bmp", "changed", "mask: checksum differs from the index")
    ]
    data = Data(**WHOLE, loader=kind, augment="none", image_size=16)
    asked = [Request(0, np.array([2, 3, 4]))]
    with pytest.raises(RunError, match="m/03.png: cannot be decoded"):
        made(m, data, asked)
    ((images, mask),) = made(m, data.model_copy(update={"on_bad_image": "skip"}), asked)
    assert torch.equal(images, 40.0 * mask)
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(bad)
    bad.write_bytes(bad.read_bytes().ljust(len(whole), b"\0"))
    with pytest.raises(RunError, match="m/03.png: cannot be decoded .has classes that no mask had"):
        made(m, data, asked)
    bad.write_bytes(whole[:-1])
    with pytest.raises(RequestError, match=f"03.png: {len(whole) - 1} bytes, the manifest says {len(whole)}"):
        Manifest(m.path).check_files()


def test_a_tar_without_a_mask_for_each_image_is_refused(places, tmp_path):
    import shutil
    import tarfile

    shutil.copy(places["keep"].root / places["keep"].shards[0]["name"], tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = [n for n in tar.getnames() if n.endswith((".bmp", ".png"))]
        tar.extractall(tmp_path / "x", filter="data")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in names[:-1]:
            tar.add(tmp_path / "x" / name, name)
    with pytest.raises(RequestError, match="1 images have no mask beside them"):
        archive.index(tmp_path / "b.tar", processes=1, wanted=["mask"])
    with pytest.raises(RequestError, match="'y' of .*000000000.bmp has no value"):
        archive.index(tmp_path / "a.tar", processes=1, wanted=["y"])
    m = archive.index(tmp_path / "a.tar", processes=1, wanted=["x"], floats=["x"])
    assert m.own_fields == {"x": Field("float")} and m.header["left_out"] == {".mask.png beside an image": len(m)}


def test_the_loss_of_pixels_is_torchs_and_a_sample_is_a_mean():
    rng = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 4, 5, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (3, 5, 6), generator=rng)
    labels[0, :2], labels[2] = NOWHERE, NOWHERE
    found = losses.loss_function(Train(loss="pixel-cross-entropy", label_smoothing=0.1))(outputs, labels)
    own = [
        F.cross_entropy(o[None], m[None], ignore_index=NOWHERE, label_smoothing=0.1)
        for o, m in zip(outputs[:2], labels[:2], strict=True)
    ]
    assert torch.allclose(found, sum(own))
    found.backward()
    assert outputs.grad[0].abs().sum() > 0 and (outputs.grad[2] == 0).all()
    with pytest.raises(RequestError, match="a number a class for each pixel"):
        losses.loss_function(Train(loss="pixel-cross-entropy"))(outputs[:, :, :4], labels)


def test_scaling_takes_the_nearest_pixel():
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(masks.resized(mask, 4, 3), mask)
    assert np.array_equal(masks.resized(mask, 8, 6), mask.repeat(2, 0).repeat(2, 1))
    assert masks.resized(mask, 1, 1).tolist() == [[6]]


def test_what_changes_a_masks_numbers_is_refused(tmp_path):
    """A JPEG makes new ones at edges; grey of 2 or 4 bits becomes another number, and the last one 255."""
    mask = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 3)
    out = io.BytesIO()
    mask.save(out, "JPEG")
    with pytest.raises(ValueError, match="is JPEG, and a mask is one of PNG, BMP, TIFF"):
        masks.pixels(out.getvalue())

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    for bits in (2, 4):
        rows = zlib.compress(b"\0\x1b\x1b\x1b\x1b"[: 1 + bits] * 8)
        head = chunk(b"IHDR", bytes([0, 0, 0, 8, 0, 0, 0, 8, bits, 0, 0, 0, 0]))
        png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        with pytest.raises(ValueError, match="has grey of 2 or 4 bits"):
            masks.pixels(png)
    for kind, options in (("PNG", {"bits": 4}), ("PNG", {}), ("BMP", {}), ("TIFF", {"compression": "tiff_lzw"})):
        out, palette = io.BytesIO(), mask.copy()
        palette.putpalette([200, 0, 0, 0, 90, 0, 7, 7, 7])
        palette.save(out, kind, **options)
        assert (masks.pixels(out.getvalue()) == np.asarray(mask)).all()
