"""EXIF's orientation: how stored pixels are turned to stand upright. numpy only.

Eight values, told as what happens in order: 5 and above swap rows and columns, some then mirror left and right, some
then up and down. 1 leaves an image as it is.
"""

from __future__ import annotations

import numpy as np

from hpc_lbsgd.data.augment import Windows

TAG = 0x0112
SIDEWAYS, MIRROR_X, MIRROR_Y = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
MIRRORED = np.array([0, 2, 1, 4, 3, 6, 5, 8, 7])  # [orientation]: the same, and its mirror image afterwards


def turned(pixels, orientation: int):
    """Stored pixels, upright: a view of an array (H, W, C), (W, H, C) where it is sideways."""
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in MIRROR_X:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in MIRROR_Y else pixels


def upright_tensor(image, orientation: int, mirrored: bool):
    """A square stored image as a tensor (C, S, S), upright, and mirrored then: a copy."""
    orientation = int(MIRRORED[orientation]) if mirrored else orientation
    image = image.transpose(1, 2) if orientation in SIDEWAYS else image
    axes = [axis for axis, found in ((2, MIRROR_X), (1, MIRROR_Y)) if orientation in found]
    return image.flip(axes) if axes else image.clone()


def upright_sizes(width: np.ndarray, height: np.ndarray, orientation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights of stored images when they stand upright."""
    sideways = orientation >= SIDEWAYS[0]
    return np.where(sideways, height, width), np.where(sideways, width, height)


def stored_windows(windows: Windows, width: np.ndarray, height: np.ndarray, orientation: np.ndarray) -> Windows:
    """Windows of upright images (of `width` and `height`) in the coordinates of the stored ones: what a decoder that
    turns nothing has to cut, so that `turned` makes the window of it."""
    w = windows
    x = np.where(np.isin(orientation, MIRROR_X), width - w.x - w.w, w.x)
    y = np.where(np.isin(orientation, MIRROR_Y), height - w.y - w.h, w.y)
    sideways = orientation >= SIDEWAYS[0]

    def swapped(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(sideways, b, a)

    return Windows(swapped(x, y), swapped(y, x), swapped(w.w, w.h), swapped(w.h, w.w), w.flip)
