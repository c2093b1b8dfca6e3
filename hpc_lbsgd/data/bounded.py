"""Read-ahead that is bounded in bytes: a batch of large images is made in parts, few of which are under way at a time.

Each sample is a function of itself alone, so parts change no bit. Batches of ordinary images are one part, and pass
through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from hpc_lbsgd.data.source import Batch, Loader, Source
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.targets import each_tensor, joined

UNDER_WAY = 2  # parts in a loader's hands beside those made ahead: being decoded, and being resized


class Bounded:
    """A loader that is asked for at most `part_bytes` at a time, or one sample."""

    def __init__(self, loader: Loader, source: Source, part_bytes: float):
        self.loader, self.source, self.part_bytes = loader, source, part_bytes

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        counts: deque[int] = deque()  # parts of each request that was asked for

        def asked() -> Iterator[Request]:
            for request in requests:
                parts = self.parts(request)
                counts.append(len(parts))
                yield from parts

        made = self.loader.batches(asked())
        for first in made:
            parts = counts.popleft()
            if parts == 1:
                yield first
                continue
            # a part's memory is used again when the next one is asked for
            found = [copied(first), *(copied(next(made)) for _ in range(parts - 1))]
            inputs, labels, replaced = zip(*found, strict=True)
            yield Batch(joined(inputs), joined(labels), sum(replaced))

    def parts(self, request: Request) -> list[Request]:
        costs = self.source.costs(request.samples)
        if costs.sum() <= self.part_bytes:
            return [request]
        cuts, held = [], 0
        for i, cost in enumerate(costs.tolist()):
            if held and held + cost > self.part_bytes:
                cuts.append(i)
                held = 0
            held += cost
        return [Request(request.epoch, some) for some in np.split(request.samples, cuts)]


def copied(batch: Batch) -> Batch:
    return batch._replace(inputs=each_tensor(torch.clone, batch.inputs))
