"""Ranges of files on web servers: one connection a thread, kept open. Proxies are those of the environment
(`https_proxy`), credentials those of ~/.netrc."""

from __future__ import annotations

import base64
import http.client
import netrc
import os
import re
import threading
import urllib.request
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from hpc_lbsgd.data.reach import Facts, Missing, NoRanges, Unreachable
from hpc_lbsgd.errors import RunError

TIMEOUT_S = 30.0  # without a byte
REDIRECTS = 5
SAID = 1 << 16  # bytes of an answer that has none of a file
AS_IT_IS = "!#$%&'()*+,/:;=?@[]~"  # in the path of an address: what is encoded already stays
REDIRECTED, GONE, REFUSED = (301, 302, 303, 307, 308), (404, 410), (401, 403)
AGAIN = (http.client.RemoteDisconnected, ConnectionError)  # of a connection that was kept: the server closed it


class Http:
    """Files below an address. Raises what reach.py has, and nothing with an address that a server redirects to: there
    may be a signature in it."""

    def __init__(self, base: str):
        self.base, self._kept = base, threading.local()

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file; fewer where it ends."""
        status, headers, body = self._ask("GET", name, {"Range": f"bytes={start}-{stop - 1}"}, stop - start)
        if status == 416:
            return b""
        if status == 206:
            said = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
            if not said or int(said[1]) != start:
                raise Unreachable(f"asked for byte {start}, it sent {headers.get('Content-Range', 'others')}")
        return body

    def facts(self, name: str) -> Facts:
        _, headers, _ = self._ask("HEAD", name, {}, 0)
        size = headers.get("Content-Length", "")
        return Facts(int(size) if size.isdecimal() else None, headers.get("ETag"))

    def _ask(self, method: str, name: str, headers: dict[str, str], wanted: int):
        url = f"{self.base}/{quote(name)}"
        for _ in range(REDIRECTS):
            try:
                response = self._response(method, url, headers)
                if response.status in REDIRECTED:
                    self._read(response, SAID)
                    url = self._followed(name, url, response.headers.get("Location", ""))
                    continue
                return response.status, response.headers, self._body(name, method, response, wanted)
            except (http.client.InvalidURL, ValueError):  # there may be a secret in what it says
                raise RunError(f"{self.base}/{name}: it, a proxy or a redirection is no address to be asked") from None
            except (http.client.HTTPException, OSError) as problem:
                self._kept.connections = {}
                raise Unreachable(f"{type(problem).__name__}: {problem}") from None
        raise Unreachable(f"redirected more than {REDIRECTS} times")

    def _followed(self, name: str, url: str, location: str) -> str:
        to = urljoin(url, location)
        old, new = urlsplit(url).scheme, urlsplit(to).scheme
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise RunError(f"{self.base}/{name}: redirected from {old} to {new}, which is not followed")
        return to

    def _read(self, response: http.client.HTTPResponse, most: int) -> bytes:
        """What was sent, up to so many bytes; with more on its way the connection is of no use."""
        body = response.read(most + 1)
        if len(body) <= most and response.length:
            raise http.client.IncompleteRead(body, response.length)
        if len(body) > most:
            self._kept.connections = {}
        return body[:most]

    def _body(self, name: str, method: str, response: http.client.HTTPResponse, wanted: int) -> bytes:
        status = response.status
        if status == 200 and method == "GET" and response.length != wanted:
            self._kept.connections = {}  # the whole file is under way
            raise NoRanges(name)
        body = self._read(response, wanted if status in (200, 206) else SAID)
        if status in GONE:
            raise Missing(f"not there (status {status})")
        if status in REFUSED:
            raise Missing(f"not allowed (status {status})")
        if status not in (200, 206, 416):
            raise Unreachable(f"status {status} {response.reason}")
        return body

    def _response(self, method: str, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        if not hasattr(self._kept, "connections"):
            self._kept.connections = {}
        connections, key = self._kept.connections, (parts.scheme, parts.netloc)
        for reused in (True, False):
            connection = connections.pop(key, None) if reused else None
            if reused and connection is None:
                continue
            connection = connection or connected(*key)
            proxy = proxied(*key) if parts.scheme == "http" else None  # of https it sees no request
            path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), AS_IT_IS)
            path, known = (f"http://{parts.netloc}{path}", allowed(proxy)) if proxy else (path, {})
            try:
                connection.request(method, path, headers=headers | authorization(parts.hostname) | known)
                response = connection.getresponse()
            except AGAIN:
                if reused:
                    continue
                raise
            connections[key] = connection
            return response
        raise AssertionError


def proxied(scheme: str, netloc: str) -> SplitResult | None:
    found = None if urllib.request.proxy_bypass(netloc) else urllib.request.getproxies().get(scheme)
    return urlsplit(found if "://" in found else f"http://{found}") if found else None


def connected(scheme: str, netloc: str) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    proxy = proxied(scheme, netloc)
    if not proxy:
        return kind(netloc, timeout=TIMEOUT_S)
    connection = kind(proxy.hostname or "", proxy.port or 80, timeout=TIMEOUT_S)
    if scheme == "https":
        connection.set_tunnel(netloc, headers=allowed(proxy))
    return connection


def allowed(proxy: SplitResult) -> dict[str, str]:
    """What a proxy with a user in its address asks for."""
    if proxy.username is None:
        return {}
    return {"Proxy-Authorization": basic(unquote(proxy.username), unquote(proxy.password or ""))}


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


def authorization(host: str | None) -> dict[str, str]:
    """As ~/.netrc (or $NETRC) has it for this host alone."""
    try:
        found = netrc.netrc(os.environ.get("NETRC") or str(Path("~/.netrc").expanduser())).hosts.get(host)
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return {}
    return {"Authorization": basic(found[0], found[2])} if found else {}
