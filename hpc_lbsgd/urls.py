"""Addresses of data that lies elsewhere, as recipes and manifests have them: SCHEME://PLACE."""

from __future__ import annotations

import os
import re

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str | os.PathLike[str] | None) -> bool:
    return isinstance(path, str) and bool(SCHEME.match(path))


def checked(url: str, key: str) -> str:
    """`url`, its scheme in small letters, no slash at its end. Raises ValueError, which does not repeat it, where a
    secret may be in it: it would be in records, messages and the list of processes."""
    scheme, _, place = url.partition("://")
    if "::" in scheme or "::" in place.replace("[::", "["):  # in brackets: of a host, by number
        raise ValueError(f"{key}: an address within an address (::): give that of the folder itself")
    if "@" in place.partition("/")[0] or "?" in place or "#" in place:
        raise ValueError(
            f"{key}: an address of {scheme} with a user, a password, or something behind ? or # (a signature): it "
            "would be written down. Give the plain address, and the credentials where its library looks for them "
            "(http: ~/.netrc; s3: ~/.aws)"
        )
    if not place.strip("/"):
        raise ValueError(f"{key} = {url}: an address of no place")
    return f"{scheme.lower()}://{place.rstrip('/')}"
