"""Sets that lie elsewhere: who is asked for their bytes.

http.py asks web servers; fsspec, with the package that it wants for a scheme (s3fs, gcsfs, adlfs ...), all others.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hpc_lbsgd.data.http import Http
from hpc_lbsgd.data.reach import AT_START_S, Facts, Missing, Reach, Unreachable, patiently
from hpc_lbsgd.errors import RequestError, RunError

T = TypeVar("T")
LOOKING = 16  # shards at a time, at a start
BLOCK = 1 << 23  # bytes of a request, where all of a file is wanted


class Fsspec:
    """By fsspec, one object for all threads."""

    def __init__(self, base: str):
        import fsspec

        if base.startswith("file://"):  # any name is a folder's there, with :: in it too
            self.system, self.root = fsspec.filesystem("file"), base.removeprefix("file://")
            return
        try:
            self.system, self.root = fsspec.core.url_to_fs(base)
        except (ImportError, ValueError) as problem:
            raise RequestError(f"{base}: fsspec cannot open it here ({problem})") from None
        except Exception as problem:  # of any package: some connect here
            raise RequestError(f"{base}: fsspec cannot open it here ({type(problem).__name__})") from None

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self._asked(lambda path: self.system.cat_file(path, start=start, end=stop), name)

    def facts(self, name: str) -> Facts:
        found = self._asked(self.system.info, name)
        version = next((found[key] for key in ("ETag", "etag", "md5Hash", "mtime") if found.get(key)), None)
        return Facts(found.get("size"), str(version) if version else None)

    def _asked(self, function: Callable[[str], T], name: str) -> T:
        try:
            return function(posixpath.join(self.root, name))
        except FileNotFoundError:
            raise Missing("not there") from None
        except PermissionError as problem:
            raise Missing(f"not allowed ({type(problem).__name__})") from None
        except Exception as problem:  # of any package; there may be an address with a signature in what it says
            raise Unreachable(type(problem).__name__) from None


def reach(base: str) -> Reach:
    return Http(base) if base.startswith(("http://", "https://")) else Fsspec(base)


def blocks(of: Reach, name: str, size: int, what: str, waits_s: Sequence[float] | None = None) -> Iterator[bytes]:
    """All of a file of so many bytes, piece by piece. Raises as `patiently` does."""
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        yield patiently(lambda start=start, stop=stop: of.read(name, start, stop), what, waits_s)


def differing(base: str, shards: Sequence[dict]) -> list[str]:
    """What is wrong with shards below an address. Raises RequestError where ranges are not served, or nobody
    answers."""
    of = reach(base)

    def look(shard: dict) -> str | None:
        what = f"{base}/{shard['name']}"
        try:
            found = patiently(lambda: of.facts(shard["name"]), what, AT_START_S).bytes
        except Missing as problem:
            return f"{what}: {problem}"
        return None if found == shard["bytes"] else f"{what}: {found} bytes, the manifest says {shard['bytes']}"

    try:
        with ThreadPoolExecutor(LOOKING) as pool:
            problems = [problem for problem in pool.map(look, shards) if problem]
        if not problems:
            first = f"{base}/{shards[0]['name']}"
            patiently(lambda: of.read(shards[0]["name"], 0, 1), first, AT_START_S)
    except Missing as problem:  # it was there a moment ago
        problems = [f"{first}: {problem}"]
    except RunError as problem:
        raise RequestError(str(problem)) from None
    return problems
