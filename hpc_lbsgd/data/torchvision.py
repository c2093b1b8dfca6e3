"""Pillow as the decoder: the fallback, and the reference that DALI is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from hpc_lbsgd.data.ahead import ahead
from hpc_lbsgd.data.decode import pixels
from hpc_lbsgd.data.finish import Finish
from hpc_lbsgd.data.place import on_device, pinned
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
            yield on_device(batch, self.device)

    def _make(self, fetched: Fetched) -> Batch:
        while True:
            try:
                images = [self._decode(fetched, number) for number in range(len(fetched.contents))]
                break
            except SampleError as problem:
                self.source.refuse(problem)
                fetched = self.source.fetch(fetched.asked)
        made = None
        if images:
            windows = self.source.cut(fetched, images)
            made = self.finish.into(self.finish.empty(len(windows)), windows, fetched.windows.flip)
        return pinned(self.source.batch(fetched, made), self.device)

    def _decode(self, fetched: Fetched, number: int) -> np.ndarray:
        """uint8 (H, W, C)."""
        content = fetched.contents[number]
        if self.source.raw:
            return content
        try:
            return pixels(content, self.source.data.channels)
        except ValueError as problem:
            raise self.source.undecodable(fetched, number, f"Pillow: {problem}") from None
