"""Work done ahead of time in threads, handed out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


class Cut:
    """Items that end early once `over` is set: whoever takes them ahead of time comes to an end, and may begin anew."""

    def __init__(self, items: Iterable[Item]):
        self.items, self.over = items, False

    def __iter__(self) -> Iterator[Item]:
        return takewhile(lambda item: not self.over, self.items)


def ahead(function: Callable[[Item], Result], items: Iterable[Item], depth: int, threads: int) -> Iterator[Result]:
    """function(item) for every item, in order, up to `depth` of them begun before they are asked for.

    One that fails raises when its turn comes. Closing the iterator drops what has not begun, and does not wait for what
    has: it may hang.
    """
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix=getattr(function, "__name__", "ahead"))
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
