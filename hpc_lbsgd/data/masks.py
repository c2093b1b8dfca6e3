"""Masks: a class for each pixel of an image, in another image as large, with one channel of 8 bits.

A mask is cut, turned and mirrored as its image is, and resized to the nearest pixel: no class lies between two.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from hpc_lbsgd.data import parts
from hpc_lbsgd.data.decode import told
from hpc_lbsgd.data.fields import MASK
from hpc_lbsgd.data.manifest import Row, checksum
from hpc_lbsgd.data.orientation import turned

SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # formats that lose nothing
Seen = tuple[int, int, int, int, list[int]]  # width, height, bytes, checksum, classes in it: of a mask


def pixels(data) -> np.ndarray:
    """uint8 (H, W) of an encoded mask, as it is stored: colours of a palette are their numbers. Raises ValueError with
    what is wrong with it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("1", "L", "P"):
                raise ValueError(f"has pixels of mode {image.mode}, where a mask has one number of 8 bits")
            if image.format == "TIFF" and image.getexif().get(0x0112, 1) != 1:
                raise ValueError("says that it is turned; save it upright")
            return np.array(image, np.uint8)
    except Exception as problem:  # Pillow raises many kinds
        raise ValueError(told(problem)) from None


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


# ---------------------------------------------------------------- for the index


def look(content: bytes | str) -> Seen | str:
    """What a mask is, or what is wrong with it; what is wrong already stays."""
    if isinstance(content, str):
        return content
    try:
        found = pixels(content)
    except ValueError as problem:
        return str(problem)
    return found.shape[1], found.shape[0], len(content), checksum(content), np.unique(found).tolist()


def examine(root: str, paths: list[str]) -> list[Seen | str]:
    """Of each file below a folder."""
    found = []
    for path in paths:
        try:
            with open(os.path.join(root, path), "rb") as file:
                content: bytes | str = file.read()
        except OSError as problem:
            content = str(problem)
        found.append(look(content))
    return found


def identities(root: str, paths: list[str]) -> list:
    return [(path, parts.identity_of(os.path.join(root, path))) for path in paths]


def examine_in_tar(path: str, places: list[tuple[int, int]]) -> list[Seen | str]:
    """Of each (offset, bytes) of a tar."""
    with open(path, "rb") as file:
        return [look(os.pread(file.fileno(), size, offset)) for offset, size in places]


def identities_in_tar(path: str, places: list[tuple[int, int]]) -> list:
    return [path, parts.identity_of(path), places]


def beside(name: str, image: Row | str, mask: Seen | str) -> Row | str:
    """An image's row, or what is wrong with it or its mask."""
    if isinstance(image, str):
        return image
    if isinstance(mask, str):
        return f"{name}: {mask}"
    if image[:2] != mask[:2]:
        return f"{name} is {mask[0]}x{mask[1]}, and the image {image[0]}x{image[1]}, as they are stored"
    return image


def table_of(
    name: str, paths: Sequence[str], found: Sequence[Seen], offsets: Sequence[int] | None = None
) -> tuple[pa.Table, list[int]]:
    """(a mask's columns of a manifest, classes in all of them). offsets: inside tar files."""
    columns = {
        "path": pa.array(paths, pa.large_string()),
        "bytes": pa.array([mask[2] for mask in found], pa.int64()),
        "checksum": pa.array([mask[3] for mask in found], pa.uint64()),
    }
    if offsets is not None:
        columns["offset"] = pa.array(offsets, pa.int64())
    classes = sorted(set().union(*(mask[4] for mask in found)))
    return pa.table({f"{MASK}{name}:{what}": column for what, column in columns.items()}), classes


def placed(more: pa.Table, places: dict[str, list[tuple[int, int, int]]]) -> pa.Table:
    """Columns of fields, with other (bytes, checksum, offset) of masks, by name and sample."""
    for name, found in places.items():
        for what, values in zip(("bytes", "checksum", "offset"), zip(*found, strict=True), strict=True):
            title = f"{MASK}{name}:{what}"
            column = pa.array(values, pa.uint64() if what == "checksum" else pa.int64())
            known = title in more.column_names
            more = (
                more.set_column(more.column_names.index(title), title, column)
                if known
                else more.append_column(title, column)
            )
    return more
