"""What DALI says of an image, for those who ask before a run: can it be decoded, and to what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from hpc_lbsgd.data.orientation import TAG

Found = TypeVar("Found")
BATCH = 32  # images that it is asked about at a time


def version() -> str | None:
    """DALI's, if it loads."""
    try:
        import nvidia.dali
    except ImportError:
        return None
    return nvidia.dali.__version__


def seen(contents: Sequence[bytes], look: Callable[[np.ndarray], Found]) -> list[Found | str]:
    """`look` of the pixels (H, W, 3) of each image, or why it cannot be decoded."""
    parts = (contents[start : start + BATCH] for start in range(0, len(contents), BATCH))
    return [found for part in parts for found in _seen(part, look)]


def unturned(content: np.ndarray) -> np.ndarray:
    """A file's bytes for DALI. One of the decoders behind it turns TIFFs whatever it is told, sideways ones beyond the
    memory that they were given: their tag of orientation is made to say 1."""
    head = bytes(content[:8])
    order = {b"II": "little", b"MM": "big"}.get(head[:2])
    version = order and int.from_bytes(head[2:4], order)
    if version not in (42, 43):
        return content
    # BigTIFF (43) has longer numbers: of the place of the list, the count in front of it, an entry in it, a value
    place, count, entry, value = ((4, 4), 2, 12, 4) if version == 42 else ((8, 8), 8, 20, 8)

    def number(at: int, size: int) -> int:
        return int.from_bytes(content[at : at + size].tobytes(), order)

    first = number(*place)
    plain = b"".join(n.to_bytes(size, order) for n, size in ((TAG, 2), (3, 2), (1, value))) + (
        (1).to_bytes(2, order) + bytes(value - 2)
    )
    made = content
    for at in range(first + count, min(first + count + number(first, count) * entry, len(content) - entry + 1), entry):
        if number(at, 2) == TAG:
            made = made.copy() if made is content else made
            made[at : at + entry] = np.frombuffer(plain, np.uint8)
    return made


class Feed:
    """What a pipeline is given: one batch, or nothing more."""

    def __init__(self) -> None:
        self.batch: list[np.ndarray] = []

    def __call__(self) -> list[np.ndarray]:
        return self.batch


@cache
def pipeline() -> tuple[Any, Feed]:
    """A pipeline that decodes as the loader does."""
    from nvidia.dali import Pipeline, fn, types

    feed = Feed()
    made = Pipeline(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with made:
        encoded = fn.external_source(source=feed, batch=True)
        made.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False))
    made.build()
    return made, feed


def _seen(contents: Sequence[bytes], look: Callable[[np.ndarray], Found]) -> list[Found | str]:
    """The same for one batch; halves of it where it fails, for DALI does not say which image it was."""
    made, feed = pipeline()
    feed.batch = [unturned(np.frombuffer(data, np.uint8)) for data in contents]
    try:
        (images,) = made.run()
        return [look(np.asarray(images.at(i))) for i in range(len(images))]
    except RuntimeError as problem:
        pipeline.cache_clear()  # it is broken now
        if len(contents) == 1:
            return [reason(problem)]
        half = len(contents) // 2
        return _seen(contents[:half], look) + _seen(contents[half:], look)


def reason(problem: RuntimeError) -> str:
    """What a pipeline's error says was wrong."""
    told = str(problem).partition("encountered:")[2] or str(problem)
    return next((line.strip() for line in told.splitlines() if line.strip()), "no reason given")[:200]
