"""What index accepts, every loader decodes, to the same picture."""

import io
import os

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from hpc_lbsgd.data import decode, loader
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Data

RNG = np.random.default_rng(3)
MUTANTS, SEED = (int(os.environ.get(name, default)) for name, default in (("MUTANTS", 280), ("SEED", 17)))
PHOTO = RNG.integers(0, 255, (24, 36, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(**options):
    return encoded(Image.fromarray(PHOTO), "JPEG", quality=90, **options)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def pictures(path, kind, channels=3, size=48):
    """All samples of a set, as a loader makes them."""
    m = trees.Manifest(path)
    data = Data(loader=kind, channels=channels, image_size=size, augment="resized-crop", eval_resize=size,
                mean=[0.0] * channels, std=[1.0] * channels)  # fmt: skip
    made = loader.create(data, m, 0, False, len(m), 1, 1, False, torch.device("cpu"))
    (batch,) = made.batches([Request(0, np.arange(len(m)))])
    return batch.inputs.clone()


GOOD = {
    "motion.jpg": jpeg()
    + b"\x00\x00\x00\x18ftypmp42"
    + bytes(RNG.integers(0, 256, 500, dtype=np.uint8))
    + b"\xff\xda..",
    "progressive.jpg": jpeg(progressive=True),
    "thumbnail.jpg": jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + jpeg()[:300] + b"\xff\xd9"),
    "turned.jpg": jpeg(exif=turned()),
    "turned.png": encoded(Image.fromarray(PHOTO), "PNG", exif=turned()),
    "deep.png": encoded(Image.fromarray((PHOTO[..., 0].astype(np.uint16) << 8) + 77), "PNG"),
    "deep.tif": encoded(Image.fromarray((PHOTO[..., 0].astype(np.uint16) << 8) + 77), "TIFF"),
    "turned.tif": encoded(Image.fromarray(PHOTO), "TIFF", exif=turned()),
    "palette.png": encoded(Image.fromarray(PHOTO).quantize(16), "PNG"),
    "web.webp": encoded(Image.fromarray(PHOTO), "WEBP"),
}
BAD = {
    "animation.jpg": (encoded(Image.fromarray(PHOTO), "GIF"), "DALI cannot decode it"),
    "float.tif": (encoded(Image.fromarray(PHOTO[..., 0].astype(np.float32)), "TIFF"), "whose range is not known"),
    "whole.tif": (encoded(Image.fromarray(PHOTO[..., 0].astype(np.int32)), "TIFF"), "whose range is not known"),
    "cut.jpg": (jpeg()[:-100], "truncated"),
    "cut-with-thumbnail.jpg": (jpeg(exif=b"Exif\0\0" + jpeg()[:300] + b"\xff\xd9")[:-100], "truncated"),
    "stray.jpg": (jpeg()[:2] + b"\x00" + jpeg()[2:], ""),
    # what is white where not 255 is: Pillow asks, DALI does not
    "dark.pgm": (b"P5 8 8 15\n" + bytes(range(8)) * 8, "is another picture for Pillow than for DALI"),
    "dark.ppm": (b"P6 8 8 100\n" + bytes(range(96)) * 2, "is another picture for Pillow than for DALI"),
}


def test_odd_but_good_images_are_the_same_to_both_loaders(tmp_path):
    (tmp_path / "c").mkdir()
    for name, content in GOOD.items():
        (tmp_path / "c" / name).write_bytes(content)
    m = trees.index(tmp_path, processes=1)
    assert len(m) == len(GOOD) and m.header["decoders"].keys() == {"pillow", "dali"}
    for channels in (3, 1):
        ours, dalis = (pictures(m.path, kind, channels) for kind in ("torchvision", "dali"))
        for i in range(len(m)):
            apart = (ours[i] - dalis[i]).abs()  # at the edge of a decoded part colours are rounded otherwise
            assert apart.mean() < 1 and apart.max() <= 16, m.key(i)
        deep = ours[[i for i in range(len(m)) if "deep" in m.key(i)]]
        assert 40 < deep.mean() < 210 and deep.std() > 20  # not all black, not all white


def test_what_one_decoder_refuses_is_refused_by_name(tmp_path):
    write_images(tmp_path, 4, 16, classes=1)
    for name, (content, _) in BAD.items():
        (tmp_path / "class-0" / name).write_bytes(content)
    with pytest.raises(RequestError) as refused:
        trees.index(tmp_path, processes=1)
    for name, (_, says) in BAD.items():
        (line,) = [row for row in str(refused.value).splitlines() if f"/{name}:" in row]
        assert says in line
    m = trees.index(tmp_path, processes=1, exclude=True)  # in one pass
    assert len(m) == 4 and len((tmp_path / "exclude.txt").read_text().splitlines()) == len(BAD)
    assert len(trees.index(tmp_path, processes=1)) == 4


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of headers
def test_no_mutant_is_accepted_that_a_loader_refuses(tmp_path):
    """Bytes flipped, cut out and put in: what index takes, both loaders decode."""
    kinds = {".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".ppm": "PPM"}
    bases = {suffix: encoded(Image.fromarray(PHOTO), kind) for suffix, kind in kinds.items()}
    bases |= {".jpg": jpeg(), "p.jpg": jpeg(progressive=True, exif=turned())}
    (tmp_path / "c").mkdir()
    rng = np.random.default_rng(SEED)
    for i in range(MUTANTS):
        suffix, base = list(bases.items())[i % len(bases)]
        data = bytearray(base)
        head = min(len(data), 700)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(2, head if rng.random() < 0.7 else len(data)))
            match int(rng.integers(3)):
                case 0:
                    data[at] ^= 1 << int(rng.integers(8))
                case 1:
                    del data[at : at + int(rng.integers(1, 9))]
                case 2:
                    data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
        (tmp_path / "c" / f"{i:05d}{suffix}").write_bytes(data)
    m = trees.index(tmp_path, processes=2, exclude=True)
    assert MUTANTS // 10 < len(m) < MUTANTS  # some live, some do not
    keep = (m.widths < 4000) & (m.heights < 4000)
    assert keep.mean() > 0.9
    for kind in ("torchvision", "dali"):
        for channels in (3, 1):
            assert len(pictures(m.path, kind, channels)) == len(m)


def test_a_jpegs_end_is_found_behind_all_its_segments():
    for data in (jpeg(), jpeg(progressive=True), GOOD["thumbnail.jpg"], jpeg(exif=turned())):
        assert decode.jpeg_end(data) == len(data)
        assert decode.jpeg_end(data + b"more\xff\xda") == len(data)
        for cut in RNG.integers(3, len(data) - 1, 40):
            assert decode.jpeg_end(data[: int(cut)]) is None
