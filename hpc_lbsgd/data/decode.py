"""What is an image: one answer for index, verify, pack and both loaders.

A file is one if every decoder that is installed decodes it, to the same size. DALI, which trains, is stricter than
Pillow in some formats and does not know others; a set that was indexed where DALI is missing says so in its manifest.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import NamedTuple

import numpy as np

from hpc_lbsgd.data import dali_check
from hpc_lbsgd.data.orientation import MIRROR_X, MIRROR_Y, SIDEWAYS, TAG

PILLOW, DALI = "pillow", "dali"
APART = 24  # of 255, in a part of an image: no two ways of rounding are so far from one another
WIDE = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of 16-bit grey


class Facts(NamedTuple):
    """What decoding an image says of it. Sizes are of the pixels as they are stored."""

    width: int
    height: int
    format: str  # JPEG, PNG ...
    mode: str  # RGB, L, CMYK, I;16 ... (Pillow's names)
    orientation: int  # EXIF's, 1 to 8: how it is to be turned
    glance: bytes  # its colours, as `glance` has them


@cache
def decoders() -> dict[str, str]:
    """The decoders that are asked, with their versions."""
    found = {PILLOW: metadata.version("pillow")}
    if (dali := dali_check.version()) is not None:
        found[DALI] = dali
    return found


def decode_all(contents: Sequence[bytes]) -> list[Facts | str]:
    """For each file's content what it is, or what is wrong with it."""
    found: list[Facts | str] = []
    for data in contents:
        try:
            found.append(decode(data))
        except ValueError as problem:
            found.append(str(problem))
    if DALI in decoders():
        asked = [i for i, facts in enumerate(found) if isinstance(facts, Facts)]
        for i, other in zip(asked, dali_check.seen([contents[i] for i in asked], size_and_glance), strict=True):
            if problem := apart(found[i], other):
                found[i] = problem
    return found


def size_and_glance(decoded: np.ndarray) -> tuple[int, int, bytes]:
    """Of pixels (H, W, 3)."""
    from PIL import Image

    return decoded.shape[1], decoded.shape[0], glance(Image.fromarray(decoded))


def glance(image) -> bytes:
    """The mean colours of 4 x 4 parts of an image: enough to tell another picture."""
    from PIL import Image

    return image.convert("RGB").resize((4, 4), Image.Resampling.BOX).tobytes()


def apart(facts: Facts, dalis: tuple[int, int, bytes] | str) -> str | None:
    """What is wrong with an image that DALI sees otherwise than Pillow."""
    if isinstance(dalis, str):
        return f"DALI cannot decode it ({dalis}), though Pillow can"
    width, height, colours = dalis
    if (width, height) != (facts.width, facts.height):
        return f"is {facts.width}x{facts.height} for Pillow and {width}x{height} for DALI"
    ours, theirs = (np.frombuffer(some, np.uint8).astype(int) for some in (facts.glance, colours))
    if (most := np.abs(ours - theirs).max()) > APART:
        return f"is another picture for Pillow than for DALI ({most} of 255 levels apart): save it as PNG or JPEG"
    return None


# ---------------------------------------------------------------- Pillow


def decode(data: bytes) -> Facts:
    """Decode an image to its last row by Pillow. Raises ValueError with what is wrong with it."""
    from PIL import Image

    if not len(data):
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # chunk checksums, where the format has them
        if not has_end(image.format, data):
            raise ValueError("image file is truncated (no end marker)")
        with Image.open(io.BytesIO(data)) as image:
            kind, mode = image.format, image.mode
            stored, orientation = as_stored(image)
            return Facts(stored.width, stored.height, kind, mode, orientation, glance(stored))
    except Exception as problem:  # Pillow raises many kinds; each means: not usable as an image
        raise ValueError(told(problem)) from None


def told(problem: Exception) -> str:
    """Pillow's words, without the address of a buffer."""
    return "not an image that Pillow knows" if "cannot identify image file" in str(problem) else str(problem)


def pixels(data, channels: int, upright: bool = False) -> np.ndarray:
    """uint8 (H, W, C) of an encoded image, as it is stored or turned upright. Raises ValueError with what is wrong with
    it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            stored, orientation = as_stored(image)
            found = np.array(turned(stored, orientation if upright else 1).convert("L" if channels == 1 else "RGB"))
    except Exception as problem:  # Pillow raises many kinds
        raise ValueError(told(problem)) from None
    return found.reshape(*found.shape[:2], -1)


def as_stored(image):
    """(an image with 8 bits a channel, its orientation). Pillow turns TIFFs, and no other format: that is undone."""
    orientation = orientation_of(image)
    image.load()
    back = {6: 8, 8: 6}.get(orientation, orientation) if image.format == "TIFF" else 1
    return turned(eight_bits(image), back), orientation


def turned(image, orientation: int):
    """An image by Pillow, turned as its orientation says."""
    from PIL.Image import Transpose

    steps = (
        (SIDEWAYS, Transpose.TRANSPOSE),
        (MIRROR_X, Transpose.FLIP_LEFT_RIGHT),
        (MIRROR_Y, Transpose.FLIP_TOP_BOTTOM),
    )
    for values, how in steps:
        image = image.transpose(how) if orientation in values else image
    return image


def orientation_of(image) -> int:
    """What EXIF or XMP say, where they can be read and say something that has a meaning; else 1."""
    found = 1
    for _ in range(2):  # what could be read before it failed is there the second time, and Pillow turns TIFFs by it
        try:
            found = image.getexif().get(TAG, 1)
            break
        except Exception:  # Pillow raises many kinds for metadata that it cannot read; the pixels may be good
            continue
    return int(found) if found in range(1, 9) else 1


def eight_bits(image):
    """An image with 8 bits a channel: 16-bit grey is scaled, as DALI scales it. Raises ValueError for what has no range
    that all agree on."""
    from PIL import Image

    if image.mode in WIDE:
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}), whose range is not known; save it with 8 or 16 bits")
    return image


def has_end(image_format: str | None, data: bytes) -> bool:
    """The format's end marker is there. Pillow does not miss the last bytes of a PNG or JPEG."""
    if image_format in ("JPEG", "MPO"):
        return jpeg_end(data) is not None
    if image_format == "PNG":
        return b"IEND\xaeB`\x82" in data
    return True


def jpeg_end(data: bytes) -> int | None:
    """Where a JPEG ends, behind its end-of-image marker; None without one. Other bytes may follow (motion photos)."""
    at, scanning = 2, False
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 1 >= len(data):
            return None
        marker = data[at + 1]
        if marker == 0xD9:
            return at + 2
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8 or (scanning and marker < 0xC0):
            at += 2  # no length behind it
        else:  # a segment: its length, itself included
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            scanning = marker == 0xDA
