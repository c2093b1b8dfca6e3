"""Addresses as people write them, and what servers answer: the set, or one message without a secret."""

import base64
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from conftest import changed, write_images
from store import store

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.data import archive, manifest, pack, reach
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.http import Http
from hpc_lbsgd.data.stage import write_moved
from hpc_lbsgd.data.storage import open_storage
from hpc_lbsgd.errors import RequestError, RunError

SAMPLES = 24


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("hpc_lbsgd.data.find.AT_START_S", (0.0,))
    monkeypatch.setattr(reach, "WAITS_S", (0.0,) * 3)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    index = trees.index(write_images(root / "d", SAMPLES, 8), processes=1).path
    return pack.pack(index, root / "p", pack.Encoding(), 0.01, 1)


def contents(m):
    storage = open_storage(m)
    return [storage.content(i).tobytes() for i in range(len(m))]


@pytest.mark.parametrize(
    "url, why",
    [
        ("http://127.0.0.1:x/s", "no address to be asked"),
        ("http://[::1/s", "no address to be asked"),
        ("ftp://127.0.0.1:1/set", "fsspec cannot open it here .ConnectionRefusedError"),
        ("reference://x", "fsspec cannot open it here"),
        ("HTTP://127.0.0.1:1/s", "Connection.*refused"),
        ("https://", "of no place"),
    ],
)
def test_what_is_no_address_of_a_set_is_refused_with_one_message(url, why):
    with pytest.raises(RequestError, match=why):
        find(url)


@pytest.mark.parametrize("url", ["simplecache::http://me:word@h/x", "zip://x::https://me:word@h/y.zip"])
def test_no_secret_hides_in_an_address_within_an_address(url, small_recipe):
    for refused in (lambda: find(url), lambda: recipes.validate(changed(small_recipe, data__train=url))):
        with pytest.raises(RequestError, match="address within an address") as said:
            refused()
        assert "word" not in str(said.value)


def test_no_secret_is_taken_from_a_manifest(packed, tmp_path):
    out = tmp_path / "manifest.arrow"
    manifest.pick(packed, out, np.arange(4))
    write_moved(manifest.Manifest(out), out, "https://me:word@host/set")
    with pytest.raises(RequestError, match="a user, a password") as said:
        manifest.Manifest(out)
    assert "word@" not in str(said.value)


@pytest.mark.parametrize("folder", ["my set", "é+&=;", "a%20b", "100%"])
def test_any_folder_and_any_name_can_be_asked_for(packed, tmp_path, folder):
    shutil.copytree(packed.root, tmp_path / folder.replace("%20", " "))
    with store(tmp_path) as afar:
        m = manifest.Manifest(find(f"{afar.url}/{folder.replace('100%', '100%25')}"))
        m.check_files()
        assert contents(m) == contents(packed)


def test_a_manifest_that_was_replaced_while_it_came_is_refused_at_any_size(packed, tmp_path, monkeypatch):
    """Half of one and half of another would be wrong labels, and a start does not look at all rows of a large set."""
    monkeypatch.setattr(manifest, "ROWS_CHECKED_AT_START", 0)
    monkeypatch.setattr(manifest, "STRETCH", 1)
    shutil.copytree(packed.root, tmp_path / "set")
    labels = packed.labels.astype("<i4").tobytes()
    content = (tmp_path / "set" / "manifest.arrow").read_bytes()
    at = content.index(labels)
    (tmp_path / "set" / "manifest.arrow").write_bytes(content[:at] + labels[::-1] + content[at + len(labels) :])
    with store(tmp_path / "set") as afar:
        with pytest.raises(RequestError, match=f"^{afar.url}/manifest.arrow: .*damaged"):
            find(afar.url)
        (tmp_path / "set" / "manifest.arrow").write_bytes(content[:at])
        with pytest.raises(RequestError, match=f"^{afar.url}/manifest.arrow: .*not a manifest"):
            find(afar.url)


def test_odd_names_of_shards(packed, tmp_path):
    (tmp_path / "t").mkdir()
    names = [b"a b.tar", b"c#d?e&f=%2e%2e.tar", "é+.tar".encode()]
    for name, shard in zip(names, packed.shards, strict=False):
        shutil.copy(packed.root / shard["name"], os.fsencode(tmp_path / "t") + b"/" + name)
    here = archive.index(tmp_path / "t", processes=1)
    with store(tmp_path / "t") as afar:
        m = manifest.Manifest(find(afar.url))
        m.check_files()
        assert len(m) and contents(m) == contents(here)


def test_a_server_that_sends_more_than_it_was_asked_for(packed):
    with store(packed.root) as afar:
        m = manifest.Manifest(find(afar.url))
        afar.faults = {"*": ["more"] * 1000}
        assert contents(m) == contents(packed)
        assert (
            Http(afar.url).read(m.shards[0]["name"], 10, 20) == (packed.root / m.shards[0]["name"]).read_bytes()[10:20]
        )


def test_a_redirection_leads_to_no_file_and_not_from_a_safe_place_to_an_unsafe_one(packed):
    with store(packed.root) as front:
        front.redirect = f"file://{packed.root}"
        with pytest.raises(RequestError, match="redirected from http to file"):
            find(front.url)
        front.redirect = "http://[bad"
        with pytest.raises(RequestError, match="no address to be asked"):
            find(front.url)
        front.redirect = front.url
        with pytest.raises(RequestError, match="redirected more than"):
            find(front.url)
    with pytest.raises(RunError, match="redirected from https to http,"):
        Http("https://host/set")._followed("name", "https://host/set/name", "http://host/set/name")


def test_a_proxy_may_have_a_user_and_no_scheme(monkeypatch):
    seen = []

    class Proxy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            seen.append((self.path, self.headers.get("Proxy-Authorization")))
            self.send_error(404)

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"me:w%40rd@127.0.0.1:{proxy.server_port}")
        with pytest.raises(RequestError, match="not there"):
            find("http://data.example/my set")
        proxy.shutdown()
    word = base64.b64encode(b"me:w@rd").decode()
    assert seen == [("http://data.example/my%20set/manifest.arrow", f"Basic {word}")]
    monkeypatch.setenv("http_proxy", "http://me:word@127.0.0.1:word2")
    with pytest.raises(RequestError, match="no address to be asked") as said:
        find("http://data.example/set")
    assert "word" not in str(said.value)
