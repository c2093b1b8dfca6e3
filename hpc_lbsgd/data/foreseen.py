"""Read-ahead of a remote set: what the order will ask for is fetched long before a loader comes to it, bounded in
bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from hpc_lbsgd.data.remote import Remote
from hpc_lbsgd.data.source import Batch, Loader
from hpc_lbsgd.data.storage import Request


class Foreseen:
    """A loader whose storage is told of requests before the loader is. names: the files of a sample that it reads."""

    def __init__(self, loader: Loader, storage: Remote, names: Sequence[str | None], ahead_bytes: float):
        self.loader, self.storage, self.names, self.ahead_bytes = loader, storage, names, ahead_bytes

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        return self.loader.batches(self._told(iter(requests)))

    def _told(self, requests: Iterator[Request]) -> Iterator[Request]:
        self.storage.forget()
        waiting: deque[Request] = deque()
        while True:
            if not waiting or self.storage.outstanding < self.ahead_bytes / 2:  # many at a time: some lie together
                waiting += self._expect(requests)
            if not waiting:
                return
            request = waiting.popleft()
            self.storage.reached(request.epoch, request.samples)
            yield request

    def _expect(self, requests: Iterator[Request]) -> list[Request]:
        """As many more as the bound allows, one at least."""
        found, pieces, held = [], {}, self.storage.outstanding
        for request in requests:
            some = self.storage.pieces(request.samples.tolist(), self.names)
            pieces.setdefault(request.epoch, []).extend(some)
            held += sum(piece.stop - piece.start for piece in some)
            found.append(request)
            if held >= self.ahead_bytes:
                break
        for epoch, mine in pieces.items():
            self.storage.expect(mine, epoch)
        return found
