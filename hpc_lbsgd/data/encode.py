"""What `data pack` makes of an image."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from hpc_lbsgd.data.decode import as_stored, decode, turned
from hpc_lbsgd.data.orientation import TAG
from hpc_lbsgd.errors import RequestError


@dataclass(frozen=True)
class Encoding:
    """What becomes of an image. kind: keep its bytes, jpeg, or raw pixels (a .npy file, uint8 (H, W, C)).

    short_side, long_side: images that are larger are scaled down to it, in pixels. quality: of JPEG.
    upright: pixels are turned as their orientation says; else it is kept beside them.
    """

    kind: str = "keep"
    short_side: int | None = None
    long_side: int | None = None
    quality: int = 90
    channels: int = 3
    upright: bool = False

    def __post_init__(self):
        if self.kind == "keep" and self.upright:
            raise RequestError("--upright changes pixels: say --jpeg or --raw, what to store")
        if self.kind == "keep" and (self.short_side or self.long_side):
            raise RequestError("--short-side and --long-side change pixels: say --jpeg or --raw, what to store")
        if self.short_side and self.long_side:
            raise RequestError("--short-side and --long-side exclude each other")


def scaled(size: tuple[int, int], encoding: Encoding) -> tuple[int, int]:
    """(width, height) after scaling down; never larger than before."""
    width, height = size
    side = min(size) if encoding.short_side else max(size)
    target = encoding.short_side or encoding.long_side
    if not target or side <= target:
        return size
    return max(1, round(width * target / side)), max(1, round(height * target / side))


def encode(data: bytes, encoding: Encoding) -> tuple[bytes, int, int, int]:
    """(bytes to store, width, height, orientation) of one image. Raises ValueError for one that cannot be decoded."""
    from PIL import Image

    decode(data)  # to the last row
    with Image.open(io.BytesIO(data)) as image:
        stored, orientation = as_stored(image)
    pixels = stored.convert("L" if encoding.channels == 1 else "RGB")
    if encoding.upright:
        pixels, orientation = turned(pixels, orientation), 1
    size = scaled(pixels.size, encoding)
    if size != pixels.size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if encoding.kind == "jpeg":
        exif = Image.Exif()
        if orientation > 1:
            exif[TAG] = orientation
        pixels.save(out, "JPEG", quality=encoding.quality, exif=exif)
    else:
        array = np.asarray(pixels, np.uint8).reshape(size[1], size[0], encoding.channels)
        np.save(out, array, allow_pickle=False)
    return out.getvalue(), *size, orientation
