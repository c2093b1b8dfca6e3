"""Fields on their way into a pack: masks, boxes and further images are scaled and turned where their images are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from hpc_lbsgd.data import boxes, fields, files, masks
from hpc_lbsgd.data.encode import Encoding, encode
from hpc_lbsgd.data.manifest import Manifest, checksum
from hpc_lbsgd.data.storage import SampleError

RAW_SUFFIX, JPEG_SUFFIX = ".npy", ".jpg"
SUFFIX = re.compile(r"\.[a-z0-9]{1,12}")  # what another tar file may hold


class Carried:
    """Fields of a shard's samples. `offsets`: where each file of `files` lies in the shard, to be filled by who writes
    them."""

    def __init__(self, m: Manifest, storage, samples: range, encoding: Encoding):
        self.m, self.storage, self.encoding = m, storage, encoding
        self.first, self.columns = samples.start, m.more(samples)
        self.said: list[dict] = []
        self.facts: dict[str, list[tuple[int, int]]] = {name: [] for name in m.files}
        self.offsets: list[int] = []

    def files(self, sample: int, width: int, height: int) -> Iterator[tuple[str, bytes]]:
        """(end of the name, content) of what lies beside an image of this size there."""
        m, changed = self.m, self.encoding.kind != "keep"
        turns = int(m.orientations[sample]) if self.encoding.upright and m.orientations is not None else 1
        for name, facts in self.facts.items():
            data, suffix = self.storage.content(sample, name).tobytes(), m.suffix(sample, name)
            if checksum(data) != int(m.of_file(name, "checksum")[sample]):
                raise SampleError(sample, f"{m.file(sample, name)} changed since it was indexed; index again")
            kind = m.own_fields[name].kind
            if changed and kind == "mask":
                data, suffix = masks.fitted(data, turns, width, height), masks.SUFFIXES[0]
            elif changed and kind == "image":
                try:
                    data, suffix = encode(data, self.encoding)[0], suffix_of(self.encoding)
                except ValueError as problem:
                    raise SampleError(sample, f"{m.file(sample, name)}: cannot be decoded ({problem})") from None
            facts.append((len(data), checksum(data)))
            yield f".{name}{member_suffix(suffix)}", data
        said = fields.row_of(self.columns, sample - self.first)
        whole = (0, 0, int(m.widths[sample]), int(m.heights[sample]))
        for name in m.boxes if changed else ():
            (mine,) = m.values(name)[[sample]]
            said[name] = boxes.seen(mine, whole, turns, (width, height)).tolist()
        self.said.append(said)
        if said:
            yield ".json", json.dumps(said).encode()

    def table(self) -> pa.Table:
        """The columns of fields, as they are there."""
        changed = self.m.boxes if self.encoding.kind != "keep" else []
        table = boxes.put(self.columns, {name: [said[name] for said in self.said] for name in changed})
        places = np.array(self.offsets, np.int64).reshape(len(self.said), -1).T.tolist()
        found = {}
        for (name, facts), offsets in zip(self.facts.items(), places, strict=False):
            kind = self.m.own_fields[name].kind
            found[kind, name] = [(*fact, at) for fact, at in zip(facts, offsets, strict=True)]
        return files.placed(table, found)


def member_suffix(suffix: str) -> str:
    """Of a file in a shard: a table may name files whose own is none, is too long, or is that of a class."""
    return suffix if SUFFIX.fullmatch(suffix) and suffix not in (".cls", ".json") else ".bin"


def suffix_of(encoding: Encoding) -> str:
    """Of an image that was encoded anew."""
    return RAW_SUFFIX if encoding.kind == "raw" else JPEG_SUFFIX
