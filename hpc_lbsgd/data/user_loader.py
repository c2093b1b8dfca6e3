"""The loader of a user's own set: samples as it gives them, ahead of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import SimpleQueue

import torch

from hpc_lbsgd.data.ahead import ahead
from hpc_lbsgd.data.maker import Maker
from hpc_lbsgd.data.own import PackedSet
from hpc_lbsgd.data.place import on_device, pinned
from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.user import UserSet, collected


class UserLoader:
    """Collects a user's samples into batches, in threads, or in as many processes as `processes` says, `prefetch`
    batches ahead."""

    def __init__(
        self,
        data: UserSet | PackedSet,
        seed: int,
        threads: int,
        prefetch: int,
        channels_last: bool,
        device: torch.device,
        processes: int | None = None,
    ):
        self.data, self.seed, self.threads, self.device = data, seed, processes or threads, device
        self.ahead, self.channels_last = max(prefetch, self.threads), channels_last
        self._idle: SimpleQueue | None = SimpleQueue() if processes else None
        for _ in range(processes or 0):
            self._idle.put(None)  # not started yet

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for batch in ahead(self._make, requests, self.ahead, self.threads):
            yield on_device(batch, self.device, self.channels_last)

    def _make(self, request: Request) -> Batch:
        if self._idle is None:
            return pinned(collected(self.data, self.seed, request), self.device)
        maker = self._idle.get()
        try:
            maker = maker or Maker(self.data, self.seed)
            return pinned(maker.make(request), self.device)
        finally:
            self._idle.put(maker)
