"""EXIF's orientation: ignored or applied, alike in index, both loaders and pack, for all eight values."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import command
from PIL import Image, ImageOps

from hpc_lbsgd.data import loader, orientation, pack
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.augment import Windows
from hpc_lbsgd.data.finish import cut
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data

LOSSLESS = {".png": {}, ".tif": {}, ".webp": {"lossless": True}}
KINDS = {".png": "PNG", ".tif": "TIFF", ".webp": "WEBP", ".jpg": "JPEG"}
VALUES = range(1, 9)


def photo(seed: int, width=64, height=40) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def with_orientation(image: Image.Image, suffix: str, value: int) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = value
    image.save(out, KINDS[suffix], exif=exif, **LOSSLESS.get(suffix, {"quality": 95}))
    return out.getvalue()


def readable(value: int) -> Image.Image:
    """A picture whose WebP has no padding before its EXIF, at which DALI's parser fails."""
    for seed in range(value, 1000, 8):
        data = with_orientation(photo(seed), ".webp", value)
        at = data.find(b"VP8L") + 4
        if data[at] % 2 == 0:
            return photo(seed)
    raise AssertionError


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(images with an orientation, the same turned by Pillow and saved without one), by rows alike."""
    root = tmp_path_factory.mktemp("sets")
    for part in ("marked", "upright"):
        (root / part / "c").mkdir(parents=True)
    for suffix in LOSSLESS:
        for value in VALUES:
            name, picture = f"{suffix[1:]}-{value}", readable(value)
            (root / "marked" / "c" / f"{name}{suffix}").write_bytes(with_orientation(picture, suffix, value))
            png = Image.open(io.BytesIO(with_orientation(picture, ".png", value)))
            ImageOps.exif_transpose(png).save(root / "upright" / "c" / f"{name}{suffix}", "PNG")
    return [trees.index(root / part, processes=1) for part in ("marked", "upright")]


def pictures(m: Manifest, kind: str, how: str, train=True, **data) -> torch.Tensor:
    section = {"image_size": 32, "augment": "resized-crop", "eval_resize": 32, "mean": [0.0] * 3, "std": [1.0] * 3}
    section |= {"loader": kind, "orientation": how, **data}
    made = loader.create(Data(**section), m, 3, train, len(m), 1, 1, False, torch.device("cpu"))
    (batch,) = made.batches([Request(1, np.arange(len(m)))])
    return batch.inputs.clone()


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
@pytest.mark.parametrize("train", [True, False])
def test_applied_is_as_if_the_files_stood_upright(sets, kind, train):
    marked, upright = sets
    assert np.bincount(marked.orientations, minlength=9).tolist() == [0] + [len(LOSSLESS)] * 8
    assert set(upright.orientations) == {1}
    assert torch.equal(pictures(marked, kind, "apply", train), pictures(upright, kind, "ignore", train))


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_where_nothing_is_resized_too(tmp_path, kind):
    (tmp_path / "c").mkdir()
    for value in VALUES:
        (tmp_path / "c" / f"{value}.png").write_bytes(with_orientation(photo(value, 16, 16), ".png", value))
    m = trees.index(tmp_path, processes=1)
    small = {"image_size": 16, "eval_resize": 0}
    whole = pictures(m, kind, "apply", augment="none", **small)
    for i in range(len(m)):
        upright = np.asarray(ImageOps.exif_transpose(Image.open(m.file(i))).convert("RGB"))
        assert (whole[i].permute(1, 2, 0).numpy() == upright).all()
    crops = [pictures(m, k, "apply", augment="pad-crop", **small) for k in ("torchvision", "dali")]
    assert torch.equal(*crops) and not torch.equal(crops[0], pictures(m, kind, "ignore", augment="pad-crop", **small))


def test_ignored_all_formats_show_what_is_stored(sets):
    marked, _ = sets
    ours, dalis = (pictures(marked, kind, "ignore", train=False) for kind in ("torchvision", "dali"))
    assert torch.equal(ours, dalis)
    by_format = ours.view(len(LOSSLESS), 8, *ours.shape[1:])
    assert (by_format == by_format[0]).all()


def test_jpegs_are_turned_alike_by_both_loaders(tmp_path):
    (tmp_path / "c").mkdir()
    for value in VALUES:
        picture = photo(value, 320, 200)
        (tmp_path / "c" / f"{value}.jpg").write_bytes(with_orientation(picture, ".jpg", value))
    m = trees.index(tmp_path, processes=1)
    assert m.orientations.tolist() == list(VALUES)
    for train in (True, False):
        ours, dalis = (pictures(m, kind, "apply", train) for kind in ("torchvision", "dali"))
        assert (ours - dalis).abs().max() <= 1 and (ours - dalis).abs().mean() < 0.01


@pytest.mark.parametrize("kind", ["torchvision", "dali"])
def test_packed_sets_are_turned_alike_beside_and_baked_in(sets, tmp_path, kind):
    marked, upright = sets
    expected = pictures(marked, kind, "apply")
    kept = pack.pack(marked.path, tmp_path / "kept", pack.Encoding(), 1, 1)
    raw = pack.pack(marked.path, tmp_path / "raw", pack.Encoding("raw"), 1, 1)
    baked = pack.pack(marked.path, tmp_path / "baked", pack.Encoding("raw", upright=True), 1, 1)
    assert torch.equal(pictures(kept, kind, "apply"), expected) and kept.fingerprint == marked.fingerprint
    assert torch.equal(pictures(raw, kind, "apply"), expected)
    assert torch.equal(pictures(raw, kind, "ignore"), pictures(marked, kind, "ignore"))
    assert all(torch.equal(pictures(baked, kind, how), expected) for how in ("apply", "ignore"))


def test_jpegs_made_by_pack_keep_the_mark_or_are_turned(sets, tmp_path):
    marked, upright = sets
    kept = pack.pack(marked.path, tmp_path / "kept", pack.Encoding("jpeg", long_side=32), 1, 1)
    baked = pack.pack(marked.path, tmp_path / "baked", pack.Encoding("jpeg", upright=True), 1, 1)
    assert (kept.orientations == marked.orientations).all() and set(baked.orientations) == {1}
    assert (baked.widths == upright.widths).all() and (baked.heights == upright.heights).all()
    for m in (kept, baked):  # readers of the tar files alone see the same
        content = np.fromfile(m.root / m.shards[0]["name"], np.uint8)
        for i in range(len(m)):
            data = content[m.offsets[i] : m.offsets[i] + m.sizes[i]].tobytes()
            assert Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) == m.orientations[i]
    with pytest.raises(RequestError, match="--upright changes pixels"):
        pack.Encoding("keep", upright=True)


def test_windows_of_upright_images_are_found_in_stored_ones():
    """Any window, those that reach outside too: cut before turning is cut after turning."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (7, 11, 3), dtype=np.uint8)
    for value in VALUES:
        upright = orientation.turned(image, value)
        assert (upright == orientation.turned(image.copy(), value)).all()
        height, width = upright.shape[:2]
        how = np.array([value])
        assert [int(n[0]) for n in orientation.upright_sizes(np.array([11]), np.array([7]), how)] == [width, height]
        for _ in range(20):
            x, y, w, h = (int(rng.integers(-3, 6)), int(rng.integers(-3, 6)), *rng.integers(1, 9, 2).tolist())
            asked = Windows(*(np.array([n]) for n in (x, y, w, h)), np.array([False]))
            s = orientation.stored_windows(asked, np.array([width]), np.array([height]), how)
            found = cut(image, *(int(n[0]) for n in (s.x, s.y, s.w, s.h)))
            assert (orientation.turned(found, value) == cut(np.ascontiguousarray(upright), x, y, w, h)).all()


def test_tensors_are_turned_as_arrays_are():
    """What a GPU's pictures go through: turned when they are square, then mirrored."""
    image = np.arange(4 * 4 * 3, dtype=np.float32).reshape(4, 4, 3)
    for value in VALUES:
        for mirrored in (False, True):
            expected = orientation.turned(image, value)
            expected = expected[:, ::-1] if mirrored else expected
            found = orientation.upright_tensor(torch.from_numpy(image).permute(2, 0, 1), value, mirrored)
            assert (found.permute(1, 2, 0).numpy() == expected).all()


def test_it_is_part_of_the_result_and_old_manifests_are_refused_by_name(sets, tmp_path, small_recipe):
    from hpc_lbsgd import recipe as recipes

    prints = [recipes.validate(small_recipe, "x").model_copy(update={"data": Data(orientation=how)}).fingerprint()
              for how in ("ignore", "apply")]  # fmt: skip
    assert prints[0] != prints[1]
    marked, _ = sets
    old = tmp_path / "old.arrow"
    table = marked.table.drop_columns(["orientation"])
    with pa.OSFile(str(old), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert len(pictures_of_header(old)) == len(marked)
    with pytest.raises(RequestError, match="was made before orientations were kept; index again"):
        loader.create(Data(orientation="apply"), Manifest(old), 0, True, 4, 1, 1, False, torch.device("cpu"))


def pictures_of_header(path) -> Manifest:
    m = Manifest(path)
    assert m.orientations is None
    return m


def test_index_says_how_many_are_turned(sets):
    told = command("data", "index", sets[0].root, "--processes", "1")
    assert f"{len(LOSSLESS) * 7} images are turned by EXIF's orientation" in told.stdout


@pytest.mark.parametrize("mode, compression", [
    ("RGB", "tiff_lzw"), ("L", "packbits"), ("P", "raw"), ("RGBA", "tiff_adobe_deflate"), ("CMYK", "raw"),
    ("CMYK", "tiff_lzw"), ("I;16", "raw"),
])  # fmt: skip
def test_tiffs_of_all_kinds_are_turned_by_no_decoder(tmp_path, mode, compression):
    """Some of them are read by a decoder behind DALI that turns them itself, in memory for the stored shape."""
    (tmp_path / "c").mkdir()
    picture = photo(3)
    deep = Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 257)
    image = deep if mode == "I;16" else picture.quantize(16) if mode == "P" else picture.convert(mode)
    for value in VALUES:
        exif = Image.Exif()
        exif[0x0112] = value
        image.save(tmp_path / "c" / f"{value}.tif", compression=compression, exif=exif, big_tiff=value % 2 == 0)
    m = trees.index(tmp_path, processes=1, exclude=True)
    assert len(m) in (4, 8)  # DALI reads no BigTIFF of some kinds, and says so
    assert [m.key(i)[2] for i in range(len(m))] == [str(n) for n in m.orientations]
    for how in ("ignore", "apply"):
        ours, dalis = (pictures(m, kind, how, train=False) for kind in ("torchvision", "dali"))
        # palettes are rounded otherwise; CMYK has no one meaning as RGB, so only which way up it is can be compared
        assert (ours - dalis).abs().mean() < {"CMYK": 60, "P": 1}.get(mode, 0.01)
        for made in (ours, dalis) if how == "ignore" else ():
            assert (made == made[0]).all()


def test_a_tiffs_tag_is_made_to_say_one_and_nothing_else_is_touched():
    from hpc_lbsgd.data.dali_check import unturned

    for value in VALUES:
        for big in (False, True):
            out, exif = io.BytesIO(), Image.Exif()
            exif[0x0112] = value
            photo(1).save(out, "TIFF", exif=exif, big_tiff=big)
            content = np.frombuffer(out.getvalue(), np.uint8)
            made = unturned(content)
            assert Image.open(io.BytesIO(made.tobytes())).getexif()[0x0112] == 1
            assert (made != content).sum() == (value != 1)
    for other in (
        with_orientation(photo(1), ".jpg", 6),
        b"",
        b"II",
        b"MM\0*",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
    ):
        content = np.frombuffer(other, np.uint8)
        assert unturned(content) is content


def test_metadata_that_cannot_be_read_leaves_an_image_as_it_is(tmp_path):
    (tmp_path / "c").mkdir()
    out = io.BytesIO()
    photo(1).save(out, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"x" * 40)
    (tmp_path / "c" / "a.jpg").write_bytes(out.getvalue())
    (tmp_path / "c" / "b.png").write_bytes(with_orientation(photo(1), ".png", 9))
    assert trees.index(tmp_path, processes=1).orientations.tolist() == [1, 1]
