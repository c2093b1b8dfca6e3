"""Boxes of an image: any number, each x0, y0, x1, y1 in pixels of the image as it is stored, and more numbers behind
them (a class, a score) that stay as they are.

They are cut, turned, mirrored and scaled as the image is. What a window leaves out becomes a box without area: none is
dropped, so that other lists of a sample still agree with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from hpc_lbsgd.data.fields import LARGEST, PREFIX, NoField, texts_of
from hpc_lbsgd.data.fields import column_of as numbers_of
from hpc_lbsgd.data.orientation import MIRROR_X, MIRROR_Y, SIDEWAYS

NAME = "boxes"  # of a field, or the end of its name behind a _
CORNERS = 4  # numbers of a box that follow its image


def column_of(values: Sequence, width: int | None = None) -> pa.Array:
    """A column from lists of boxes of `width` numbers (default: as many as the first has). Raises NoField where one is
    none."""
    flat: list[list] = []
    ends = [0]
    for row, boxes in enumerate(values):
        if boxes is None:
            raise NoField(row, "has no value; an image without any has []")
        if not isinstance(boxes, list):
            raise NoField(row, f"is {str(boxes)[:40]!r}, no list of boxes")
        for box in boxes:
            width = width or (len(box) if isinstance(box, list) else None)
            check(row, box, width)
        flat += boxes
        ends.append(len(flat))
    numbers = pa.array(np.array(flat, np.float64).reshape(-1))
    return pa.LargeListArray.from_arrays(
        pa.array(ends, pa.int64()), pa.FixedSizeListArray.from_arrays(numbers, width or CORNERS)
    )


def column_for(name: str, kind: str | None, values: Sequence, as_floats: bool) -> pa.Array:
    """A field's column from its values: of the kind that is said, or that shows. Raises NoField as those do."""
    if kind == "text":
        return texts_of(values)
    if kind == "boxes" or named(name, values):
        return column_of(values)
    return numbers_of(values, as_floats)


def named(name: str, values: Sequence) -> bool:
    """A field is one of boxes by its name, where it has lists of lists, or of none."""
    lists = next((v for v in values if v), values[0] if len(values) else None)
    return (
        (name == NAME or name.endswith(f"_{NAME}"))
        and isinstance(lists, list)
        and (not lists or isinstance(lists[0], list))
    )


def check(row: int, box: object, width: int | None) -> None:
    if not isinstance(box, list) or len(box) < CORNERS or len(box) != width:
        raise NoField(row, f"has {str(box)[:60]}: a box is [x0, y0, x1, y1], and as many numbers behind them in each")
    if not all(isinstance(n, (int, float)) and abs(n) <= LARGEST for n in box):
        raise NoField(row, f"has {str(box)[:60]}: not all of it are finite numbers of float32")
    if box[2] < box[0] or box[3] < box[1]:
        raise NoField(row, f"has {str(box)[:60]}, whose second corner is not right of and below its first")


def seen(
    boxes: np.ndarray, window: Sequence[int], orientation: int, size: tuple[int, int], flip: bool = False
) -> np.ndarray:
    """Boxes (n, 4 or more) of a stored image in pixels of what is made of it: its window (x, y, w, h), turned, then
    mirrored where `flip` says so, of `size` (width, height)."""
    x, y, w, h = window
    xs = np.clip(boxes[:, [0, 2]] - x, 0, w)
    ys = np.clip(boxes[:, [1, 3]] - y, 0, h)
    if orientation in SIDEWAYS:
        xs, ys, w, h = ys, xs, h, w
    if (orientation in MIRROR_X) != bool(flip):
        xs = w - xs[:, ::-1]
    if orientation in MIRROR_Y:
        ys = h - ys[:, ::-1]
    xs, ys = xs * (size[0] / w), ys * (size[1] / h)
    return np.column_stack([xs[:, 0], ys[:, 0], xs[:, 1], ys[:, 1], boxes[:, CORNERS:]])


def put(more: pa.Table, made: dict[str, list]) -> pa.Table:
    """Columns of fields, with other boxes in place of some."""
    for name, values in made.items():
        title = PREFIX + name
        width = more.schema.field(title).type.value_type.list_size
        more = more.set_column(more.column_names.index(title), title, column_of(values, width))
    return more
