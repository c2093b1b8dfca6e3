"""How a sample is cropped and flipped: a function of (seed, epoch, sample) and nothing else.

Windows are whole pixels of the image as it is stored, or as it stands upright (data.orientation).
numpy only; the loaders turn windows into tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpc_lbsgd.data.order import hash_uniforms, stream_key

ATTEMPTS = 10  # as in torchvision's RandomResizedCrop: then the largest centred window of an allowed shape


@dataclass(frozen=True)
class Windows:
    """Per sample: left, top, width and height of the window in pixels (int64; a window may reach outside
    the image, where padding is black) and whether to flip it (bool). Arrays of shape (samples,)."""

    x: np.ndarray
    y: np.ndarray
    w: np.ndarray
    h: np.ndarray
    flip: np.ndarray

    def rows(self, index: np.ndarray) -> Windows:
        """Those of some samples."""
        return Windows(*(column[index] for column in (self.x, self.y, self.w, self.h, self.flip)))


def _uniforms(seed: int, epoch: int, samples: np.ndarray, draws: int) -> np.ndarray:
    return hash_uniforms(stream_key("augment", seed, epoch), samples, draws)


def whole(width: np.ndarray, height: np.ndarray) -> Windows:
    """The image as it is."""
    zeros = np.zeros(len(width), np.int64)
    return Windows(zeros, zeros, width, height, zeros.astype(bool))


def flip(seed: int, epoch: int, samples: np.ndarray, width: np.ndarray, height: np.ndarray) -> Windows:
    """The image, or its mirror image with probability 1/2."""
    full = whole(width, height)
    return Windows(full.x, full.y, full.w, full.h, _uniforms(seed, epoch, samples, 1)[:, 0] < 0.5)


def pad_crop(
    seed: int, epoch: int, samples: np.ndarray, width: np.ndarray, height: np.ndarray, padding: int
) -> Windows:
    """The image, padded by `padding` black pixels on each side, cut at random to its own size; or its flip
    (He et al. 2015, section 4.2, for CIFAR)."""
    u = _uniforms(seed, epoch, samples, 3)
    offset = (u[:, 1:] * (2 * padding + 1)).astype(np.int64) - padding
    return Windows(offset[:, 0], offset[:, 1], width, height, u[:, 0] < 0.5)


def resized_crop(
    seed: int,
    epoch: int,
    samples: np.ndarray,
    width: np.ndarray,
    height: np.ndarray,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Windows:
    """Scale and aspect-ratio augmentation (Goyal et al. 2017, section 5.1; Szegedy et al. 2015): a window of
    `area` (share of the image) and `aspect` (width / height, log-uniform), anywhere; or its flip.

    Up to 10 tries for a window that fits; then the largest centred one whose aspect is allowed.
    """
    u = _uniforms(seed, epoch, samples, 1 + 2 * ATTEMPTS + 2)
    width, height = np.asarray(width, np.int64), np.asarray(height, np.int64)
    target = (width * height)[:, None] * (area[0] + u[:, 1 : 1 + ATTEMPTS] * (area[1] - area[0]))
    low, high = np.log(aspect[0]), np.log(aspect[1])
    ratio = np.exp(low + u[:, 1 + ATTEMPTS : 1 + 2 * ATTEMPTS] * (high - low))
    w = np.rint(np.sqrt(target * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(target / ratio)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    rows, first = np.arange(len(samples)), fits.argmax(axis=1)
    w, h, found = w[rows, first], h[rows, first], fits.any(axis=1)
    shape = width / height
    w = np.where(found, w, np.where(shape > aspect[1], np.rint(height * aspect[1]).astype(np.int64), width))
    h = np.where(found, h, np.where(shape < aspect[0], np.rint(width / aspect[0]).astype(np.int64), height))
    w, h = np.clip(w, 1, width), np.clip(h, 1, height)
    x = np.where(found, (u[:, -2] * (width - w + 1)).astype(np.int64), (width - w) // 2)
    y = np.where(found, (u[:, -1] * (height - h + 1)).astype(np.int64), (height - h) // 2)
    return Windows(x, y, w, h, u[:, 0] < 0.5)


def centre(width: np.ndarray, height: np.ndarray, size: int, resize: int) -> Windows:
    """Evaluation at `size` pixels: the centred square that a resize of the shorter side to `resize` pixels and a
    centre crop of `size` would keep. Whole pixels; the window is resized to `size` afterwards."""
    width, height = np.asarray(width, np.int64), np.asarray(height, np.int64)
    side = np.maximum(np.rint(np.minimum(width, height) * (size / resize)).astype(np.int64), 1)
    return Windows((width - side) // 2, (height - side) // 2, side, side, np.zeros(len(width), bool))


def windows(
    data, seed: int, epoch: int, samples: np.ndarray, width: np.ndarray, height: np.ndarray, train: bool
) -> Windows:
    """The windows that a recipe's `data` section asks for."""
    if not train:
        if data.eval_resize:
            return centre(width, height, data.image_size, data.eval_resize)
        return whole(width, height)
    if data.augment == "flip":
        return flip(seed, epoch, samples, width, height)
    if data.augment == "pad-crop":
        return pad_crop(seed, epoch, samples, width, height, data.crop_padding)
    if data.augment == "resized-crop":
        return resized_crop(seed, epoch, samples, width, height, data.crop_area, data.crop_aspect)
    return whole(width, height)
