"""From decoded windows to a normalised batch on the CPU: resize, mirror, normalise. Both loaders end here.

torch resizes bytes several times as fast as DALI does on a CPU (docs/results/loader.md), to the same pixels within a
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

TURN = 8  # images that a thread takes at a time: few, so that none is waited for long

# F.interpolate(mode="bilinear", antialias=True), which alone can be told where and in which layout to write
_resize = torch.ops.aten._upsample_bilinear2d_aa.out


class Finish:
    """Batches of `data.image_size` (S) pixels from windows, in `threads` threads; an image is one thread's work."""

    def __init__(self, data, resizes: bool, channels_last: bool, threads: int):
        self.resizes = resizes
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        size, channels = data.image_size, data.channels
        self.shape = (channels, size, size)
        # as wide as a row, so that they lie in memory as pixels do
        self.mean, self.std = (
            torch.tensor(v).view(1, -1, 1, 1).expand(1, channels, 1, size).contiguous(memory_format=self.layout)
            for v in (data.mean, data.std)
        )
        # torch's own threads would cut one image in pieces
        self._pool = ThreadPoolExecutor(threads, "finish", initializer=torch.set_num_threads, initargs=(1,))

    def empty(self, images: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Room for a batch: (B, C, S, S), its values undefined."""
        return torch.empty(images, *self.shape, dtype=dtype, memory_format=self.layout)

    def into(self, images: torch.Tensor, windows: Sequence[np.ndarray], flip: np.ndarray) -> torch.Tensor:
        """Fill `images` (B, C, S, S) from windows (h, w, C) of bytes, mirrored where `flip` (B,) says so; h = w = S
        where nothing is resized. Returns `images`."""
        if self.resizes:
            count = len(windows)
            parts = [range(first, min(first + TURN, count)) for first in range(0, count, TURN)]
            list(self._pool.map(lambda part: self._some(images, windows, flip, part), parts))
            return images
        pixels = np.stack(windows)  # small images: a call for each would cost more than the work
        pixels[flip] = pixels[flip, :, ::-1]
        return self._normalise(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def _some(self, images: torch.Tensor, windows: Sequence[np.ndarray], flip: np.ndarray, part: range) -> None:
        resized = self.empty(1, torch.uint8)
        for i in part:
            window = torch.from_numpy(windows[i]).permute(2, 0, 1)[None]
            _resize(window, self.shape[1:], False, None, None, out=resized)
            self._normalise(images[i : i + 1], resized.flip(3) if flip[i] else resized)

    def _normalise(self, images: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return images.copy_(pixels).sub_(self.mean).div_(self.std)


def cut(image: np.ndarray, x: int, y: int, w: int, h: int, outside: int = 0) -> np.ndarray:
    """The window of an image (H, W, C) whose corner is x, y and whose size is w, h; black (or `outside`) where it
    reaches outside."""
    height, width, channels = image.shape
    if 0 <= x <= width - w and 0 <= y <= height - h:
        return image[y : y + h, x : x + w]
    window = np.full((h, w, channels), outside, np.uint8)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if left < right and top < bottom:
        window[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return window
