"""Files of strangers: mutated recipes, sites, tars, images. Refused by one message, or read; never a traceback, a
hang or memory without bound."""

from __future__ import annotations

import os
import random
import resource
import signal
import tarfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from core import Injection, Row, hold

from hpc_lbsgd.cluster import sites
from hpc_lbsgd.data import archive
from hpc_lbsgd.data.decode import decode_all
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import read

PIECES = (b"\0", b"\xff" * 9, b"[" * 40, b": ", b"\n", b"9" * 30, b"-", b"~", b"1e999")
BATCH, SECONDS, MEMORY = 50, 60, 8 * 2**30


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


def _recipe(path: Path) -> None:
    read(str(path))


def _site(path: Path) -> None:
    sites.read(str(path))


def _tar(path: Path) -> None:
    archive.samples_of([path], None)


def _image(path: Path) -> None:
    decode_all([path.read_bytes()])


def _first(kind: str, folder: Path) -> bytes:
    from conftest import write_images

    package = Path(sites.__file__).parents[1]
    if kind == "recipe":
        return (package / "recipes" / "goyal-resnet50.yaml").read_bytes()
    if kind == "site":
        return sorted((package / "cluster" / "sites").glob("*.yaml"))[0].read_bytes()
    suffix = random.Random(folder.name).choice([".png", ".jpg"])
    images = sorted(write_images(folder / "set", 4, 8, suffix=suffix).rglob(f"*{suffix}"))
    if kind == "image":
        return images[0].read_bytes()
    with tarfile.open(folder / "whole.tar", "w") as tar:
        for image in images:
            tar.add(image, f"{image.parent.name}/{image.name}")
    return (folder / "whole.tar").read_bytes()


KINDS = {"recipe": (_recipe, ".yaml"), "site": (_site, ".yaml"), "tar": (_tar, ".tar"), "image": (_image, ".bin")}


def fuzz(kind: str):
    look, suffix = KINDS[kind]

    def run(rng: random.Random, folder: Path) -> Iterator[Injection]:
        first = _first(kind, folder)
        cases = [mutated(first, rng) for _ in range(BATCH)]
        log, begun = folder / "log", time.monotonic()
        pid = os.fork()
        if not pid:
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                signal.alarm(SECONDS)
                for number, case in enumerate(cases):
                    path = folder / f"case{suffix}"
                    path.write_bytes(case)
                    try:
                        look(path)
                    except (RequestError, RunError):
                        pass
                    except BaseException:
                        log.write_text(f"case {number}: {case[:400]!r}\n{traceback.format_exc()}")
                        os._exit(1)
                os._exit(0)
            finally:
                os._exit(2)
        _, status = os.waitpid(pid, 0)
        said = log.read_text() if log.exists() else f"ended with {os.waitstatus_to_exitcode(status)}"
        hold(status == 0, said)
        seconds = round((time.monotonic() - begun) / BATCH, 4)
        yield Injection(f"{BATCH} cases of a {kind}", "refused, or read", seconds, 0, cases=BATCH)

    return run


ROWS = [
    Row(f"fuzz-{kind}", f"a {kind} with changed bytes", "one message or none; no traceback, hang, memory without bound",
        10_000, fuzz(kind), cost_s=0.006)
    for kind in KINDS
]  # fmt: skip
