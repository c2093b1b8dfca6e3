"""Masks: a class for each pixel of an image, in another image as large, with one channel of 8 bits.

A mask is cut, turned and mirrored as its image is, and resized to the nearest pixel: no class lies between two.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from hpc_lbsgd.data.decode import told
from hpc_lbsgd.data.orientation import turned

SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "BMP", "TIFF")  # Pillow's names of the same: they lose nothing


def pixels(data) -> np.ndarray:
    """uint8 (H, W) of an encoded mask, as it is stored: colours of a palette are their numbers. Raises ValueError with
    what is wrong with it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in FORMATS:
                raise ValueError(f"is {image.format}, and a mask is one of {', '.join(FORMATS)}")
            if any(str(tile.args).find(f"L;{bits}") >= 0 for tile in image.tile for bits in (2, 4)):
                raise ValueError(
                    "has grey of 2 or 4 bits, which is scaled to 8: save it with 8 bits, or with a palette"
                )
            if image.mode not in ("1", "L", "P"):
                raise ValueError(f"has pixels of mode {image.mode}, where a mask has one number of 8 bits")
            if image.format == "TIFF" and image.getexif().get(0x0112, 1) != 1:
                raise ValueError("says that it is turned; save it upright")
            return np.array(image, np.uint8)
    except Exception as problem:  # Pillow raises many kinds
        raise ValueError(told(problem)) from None


def look(content: bytes) -> tuple[int, int, list[int]]:
    """(width, height, classes in it) of an encoded mask. Raises ValueError as `pixels` does."""
    found = pixels(content)
    return found.shape[1], found.shape[0], np.unique(found).tolist()


def check(mask: np.ndarray, classes: Sequence[int]) -> None:
    """Raise ValueError for a class that was in no mask of the set: a loss would read beyond its scores."""
    known = np.zeros(256, bool)
    known[list(classes)] = True
    if not known[mask].all():
        raise ValueError("has classes that no mask had when it was indexed; index again")


def encoded(mask: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return out.getvalue()


def resized(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """To the nearest pixel (H, W): what lies at the middle of each new one."""
    rows = (2 * np.arange(height) + 1) * mask.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * mask.shape[1] // (2 * width)
    return mask[rows[:, None], columns]


def fitted(data: bytes, orientation: int, width: int, height: int) -> bytes:
    """A PNG of a mask, turned, and of the size that its image has now."""
    return encoded(resized(turned(pixels(data), orientation), width, height))
