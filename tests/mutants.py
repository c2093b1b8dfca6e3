"""Files as strangers and bad disks make them."""

from __future__ import annotations

import random

PIECES = (b"\0", b"\xff" * 9, b"[" * 40, b": ", b"\n", b"9" * 30, b"-", b"~", b"1e999")


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, or put in from elsewhere."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 64])
        act = rng.randrange(4)
        if act == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif act == 1:
            del data[place : place + length]
        elif act == 2:
            data[place:place] = data[place : place + length]
        else:
            data[place:place] = rng.choice(PIECES)
    return bytes(data)
