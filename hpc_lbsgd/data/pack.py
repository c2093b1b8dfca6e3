"""`data pack` of a manifest: what of its images goes into shards (shards.py), as they are, as JPEG, or as pixels.

A process holds one image at a time.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data import shards
from hpc_lbsgd.data.carried import Carried, member_suffix, suffix_of
from hpc_lbsgd.data.encode import Encoding, encode
from hpc_lbsgd.data.find import find
from hpc_lbsgd.data.manifest import PACKED_SCHEMA, Manifest, checksum
from hpc_lbsgd.data.storage import SampleError, open_storage
from hpc_lbsgd.errors import RequestError


class Images:
    """The images of a manifest, with their classes and fields."""

    def __init__(self, source: str | os.PathLike, encoding: Encoding):
        self.path, self.encoding = find(source), encoding
        m = Manifest(self.path)
        if m.own:
            raise RequestError(f"{source}: is a packed set of your own already")
        m.check_labels(all_of_them=True)
        m.check_content(at_any_size=True)  # a pack's own digest would vouch for what is damaged here

    def request(self) -> dict:
        return {"source": Manifest(self.path).fingerprint, "encoding": asdict(self.encoding)}

    def cuts(self, shard_bytes: float) -> list[tuple[int, int]]:
        """As many samples as are expected to fill a shard."""
        m, encoding = Manifest(self.path), self.encoding
        if encoding.kind == "raw":
            sizes = expected_pixels(m, encoding) * encoding.channels * (1 + len(m.of_kind("image")))
        else:
            sizes = np.asarray(m.sizes)
        for name in m.of_kind("bytes") if encoding.kind == "raw" else m.of_kind("bytes", "image"):
            sizes = sizes + np.asarray(m.of_file(name, "bytes"))
        ends = np.cumsum(sizes + 3 * shards.TAR_BLOCK)
        cuts, first = [], 0
        while first < len(m):
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + shard_bytes, side="right")))
            cuts.append((first, last))
            first = last
        return cuts

    def write(self, number: int, first: int, last: int, put: shards.Put) -> pa.Table:
        m, encoding = Manifest(self.path), self.encoding
        storage = open_storage(m)
        rows: dict[str, list] = {field: [] for field in PACKED_SCHEMA.names}
        carried = Carried(m, storage, range(first, last), encoding)
        for sample in range(first, last):
            data = storage.content(sample).tobytes()
            if checksum(data) != int(m.checksums[sample]):
                raise SampleError(sample, f"{m.file(sample)} changed since it was indexed; index again")
            width, height = int(m.widths[sample]), int(m.heights[sample])
            orientation = None if m.orientations is None else int(m.orientations[sample])
            stem, suffix = os.path.splitext(m.stored_key(sample))
            if encoding.kind != "keep":
                try:
                    data, width, height, orientation = encode(data, encoding)
                except ValueError as problem:
                    raise SampleError(sample, f"{m.file(sample)}: cannot be decoded ({problem})") from None
                suffix = suffix_of(encoding)
            label = int(m.labels[sample])
            offset = put(f"{sample:09d}{member_suffix(suffix.lower())}", data)
            if m.classes:
                put(f"{sample:09d}.cls", str(label).encode())
            for end, beside in carried.files(sample, width, height):
                carried.offsets.append(put(f"{sample:09d}{end}", beside))
            described = (width, height, len(data), checksum(data), orientation)
            row = (stem + suffix, label, *described, number, offset)
            for field, value in zip(PACKED_SCHEMA.names, row, strict=True):
                rows[field].append(value)
        return manifests.with_columns(pa.table(rows, schema=PACKED_SCHEMA), carried.table())

    def header(self) -> dict:
        m, kind = Manifest(self.path), self.encoding.kind
        found = {key: m.header[key] for key in ("classes", "escaped", "decoders", "masks") if key in m.header}
        if kind == "raw":
            found["raw_channels"] = self.encoding.channels
        # bytes that were kept are the same data wherever they lie; the rows are then the source's own
        return found | ({"fingerprint": m.fingerprint} if kind == "keep" else {})


def expected_pixels(m: Manifest, encoding: Encoding) -> np.ndarray:
    width, height = np.asarray(m.widths, np.int64), np.asarray(m.heights, np.int64)
    if not (encoding.short_side or encoding.long_side):
        return width * height
    side = np.minimum(width, height) if encoding.short_side else np.maximum(width, height)
    shrink = np.minimum(1.0, (encoding.short_side or encoding.long_side) / side.astype(np.float64))
    return (width * height * shrink**2).astype(np.int64) + 1


def pack(
    source: str | os.PathLike, out: str | os.PathLike, encoding: Encoding, shard_mb: float, processes: int | None = None
) -> Manifest:
    """`shards.pack` of a manifest."""
    return shards.pack(Images(source, encoding), out, shard_mb, processes)
