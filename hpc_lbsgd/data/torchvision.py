"""Pillow as the decoder: the fallback, and the reference that DALI is compared with."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image

from hpc_lbsgd.data.ahead import ahead
from hpc_lbsgd.data.finish import Finish
from hpc_lbsgd.data.source import Batch, Fetched, Source
from hpc_lbsgd.data.storage import READERS, Request, SampleError


class TorchvisionLoader:
    """Decodes whole batches in threads, `prefetch` of them ahead."""

    def __init__(
        self, source: Source, max_batch: int, threads: int, prefetch: int, channels_last: bool, device: torch.device
    ):
        self.source, self.threads, self.ahead, self.device = source, threads, max(prefetch, threads), device
        self.finish = Finish(source.data, source.resizes, channels_last, threads)

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        fetched = ahead(self.source.fetch, requests, self.ahead, READERS)
        for batch in ahead(self._make, fetched, self.ahead, self.threads):
            yield self._place(batch)

    def _place(self, batch: Batch) -> Batch:
        return Batch(batch.images.to(self.device), batch.labels.to(self.device), batch.replaced)

    def _make(self, fetched: Fetched) -> Batch:
        while True:
            try:
                pixels = [
                    self._decode(content, sample)
                    for content, sample in zip(fetched.contents, fetched.given.samples.tolist(), strict=True)
                ]
                break
            except SampleError as problem:
                self.source.refuse(problem)
                fetched = self.source.fetch(fetched.asked)
        given = fetched.given
        windows, flip = self.source.cut(given, pixels), self.source.windows(given).flip
        images = self.finish.into(self.finish.empty(len(windows)), windows, flip)
        return Batch(images, torch.from_numpy(self.source.labels(given)), fetched.replaced)

    def _decode(self, content: np.ndarray, sample: int) -> np.ndarray:
        """uint8 (H, W, C)."""
        if self.source.raw:
            return content
        try:
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.array(image.convert("L" if self.source.data.channels == 1 else "RGB"))
        except Exception as problem:  # PIL raises many kinds
            raise SampleError(
                sample,
                f"{self.source.manifest.file(sample)}: cannot be decoded ({problem}); it changed since it was "
                "indexed. Mend it, or have it left out (hpc-lbsgd data verify), and index again",
            ) from None
        return pixels.reshape(*pixels.shape[:2], -1)
