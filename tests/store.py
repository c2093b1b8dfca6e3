"""A web server on this machine for a folder, that serves ranges, counts what it is asked for, and fails as it is
told."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Store(ThreadingHTTPServer):
    """`served`: how often each (path, first byte, last byte) was sent whole. `faults`: what is done to the next
    requests for a path, one each: "503", "cut", "short", "wrong", "slow", "more"."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.ranges, self.delay_s = root, True, 0.0
        self.served: Counter = Counter()
        self.faults: dict[str, list[str]] = {}
        self.seen: list[tuple[str, str | None]] = []  # method, authorization
        self.redirect = self.password = ""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def bytes_sent(self) -> int:
        """Of shards."""
        return sum(n * (stop - start + 1) for (path, start, stop), n in self.served.items() if path.endswith(".tar"))

    def file(self, path: str, send: bool) -> Path:
        """What is sent, or only told of, for a path."""
        return self.root / path.lstrip("/")

    def fault(self, path: str) -> str | None:
        with self.lock:
            waiting = self.faults.get(path) or self.faults.get("*")
            return waiting.pop(0) if waiting else None


class Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def status(self, code: int, **headers) -> None:
        self.send_response(code)
        for name, value in {"Content_Length": 0, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def answer(self, send: bool) -> None:
        store, path = self.server, unquote(self.path.split("?")[0])
        store.seen.append((self.command, self.headers.get("Authorization")))
        if store.redirect:
            return self.status(302, Location=f"{store.redirect}{self.path}?Signature=hidden")
        if store.password and self.headers.get("Authorization") != store.password:
            return self.status(401)
        file = store.file(path, send)
        if not file.is_file():
            return self.status(404)
        size, tag = file.stat().st_size, f'"{file.stat().st_mtime_ns}"'
        asked = self.headers.get("Range") if store.ranges else None
        if not send:
            return self.status(200, Content_Length=size, ETag=tag)
        fault = store.fault(path)
        if fault == "503":
            return self.status(503)
        first, last = 0, size - 1
        if asked:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            if first >= size:
                return self.status(416)
            last = size - 1 if fault == "more" else min(last, size - 1)
        with open(file, "rb") as content:
            content.seek(first)
            body = content.read(last + 1 - first)
        if fault == "wrong":
            body = bytes(b ^ 1 for b in body)
        if fault == "short":
            body = body[: len(body) // 2]
        time.sleep(store.delay_s + (3 if fault == "slow" else 0))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", tag)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        if fault == "cut":
            self.close_connection = True
        elif fault is None:
            with store.lock:
                store.served[path, first, last] += 1


@contextlib.contextmanager
def store(root: str | os.PathLike) -> Iterator[Store]:
    serving = Store(Path(root))
    thread = threading.Thread(target=serving.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield serving
    finally:
        serving.shutdown()
        serving.server_close()
