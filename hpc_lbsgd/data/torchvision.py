"""PIL and torchvision as the loader: the fallback, and the reference that DALI is compared with."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from hpc_lbsgd.data.loader import Batch, Source
from hpc_lbsgd.data.storage import Request, read_ahead
from hpc_lbsgd.errors import RunError


class TorchvisionLoader:
    """Decodes whole batches in threads, `prefetch` of them ahead."""

    def __init__(
        self, source: Source, max_batch: int, threads: int, prefetch: int, channels_last: bool, device: torch.device
    ):
        self.source, self.threads, self.ahead, self.device = source, threads, max(prefetch, threads), device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        shape = (1, source.data.channels, 1, 1)
        self.mean, self.std = (torch.tensor(v).view(shape) for v in (source.data.mean, source.data.std))

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        waiting: deque[Future] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            try:
                for request, encoded in read_ahead(self.source.storage, requests, depth=self.ahead):
                    waiting.append(pool.submit(self._make, request, encoded))
                    if len(waiting) > self.ahead:
                        yield self._place(waiting.popleft().result())
                while waiting:
                    yield self._place(waiting.popleft().result())
            finally:
                for future in waiting:
                    future.cancel()

    def _place(self, batch: Batch) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)

    def _make(self, request: Request, encoded: list[np.ndarray]) -> Batch:
        data, w = self.source.data, self.source.windows(request)
        images = torch.empty(len(encoded), data.channels, data.image_size, data.image_size)
        for i, content in enumerate(encoded):
            image = self._decode(content, int(request.samples[i]))
            image = F.crop(image, int(w.y[i]), int(w.x[i]), int(w.h[i]), int(w.w[i]))  # black outside the image
            if self.source.resizes:
                image = F.resize(image, [data.image_size] * 2, antialias=True)
            images[i] = F.horizontal_flip(image) if w.flip[i] else image
        images = images.sub_(self.mean).div_(self.std).contiguous(memory_format=self.memory_format)
        return images, torch.from_numpy(self.source.labels(request))

    def _decode(self, content: np.ndarray, sample: int) -> torch.Tensor:
        """(C, H, W) float32 on the scale of 0 to 255, so that resizing does not round."""
        try:
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.array(image.convert("L" if self.source.data.channels == 1 else "RGB"), np.float32)
        except Exception as problem:  # PIL raises many kinds
            raise RunError(
                f"{self.source.storage.name(sample)}: cannot be decoded ({problem}); it changed since it was "
                "indexed. Mend it or remove it and index again"
            ) from None
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
