"""Fields on their way into a pack: masks and boxes are scaled and turned where their images are."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from hpc_lbsgd.data import boxes, fields, masks
from hpc_lbsgd.data.encode import Encoding
from hpc_lbsgd.data.manifest import Manifest, checksum
from hpc_lbsgd.data.storage import SampleError


class Carried:
    """Fields of a shard's samples. `offsets`: where each file of `files` lies in the shard, to be filled by who writes
    them."""

    def __init__(self, m: Manifest, storage, samples: range, encoding: Encoding):
        self.m, self.storage, self.encoding = m, storage, encoding
        self.first, self.columns = samples.start, m.more(samples)
        self.said: list[dict] = []
        self.mask_facts: dict[str, list[tuple[int, int]]] = {name: [] for name in m.masks}
        self.offsets: list[int] = []

    def files(self, sample: int, width: int, height: int) -> Iterator[tuple[str, bytes]]:
        """(end of the name, content) of what lies beside an image of this size there."""
        m, changed = self.m, self.encoding.kind != "keep"
        turns = int(m.orientations[sample]) if self.encoding.upright and m.orientations is not None else 1
        for name, facts in self.mask_facts.items():
            data, suffix = self.storage.content(sample, name).tobytes(), m.suffix(sample, name)
            if checksum(data) != int(m.of_mask(name, "checksum")[sample]):
                raise SampleError(sample, f"{m.file(sample, name)} changed since it was indexed; index again")
            if changed:
                data, suffix = masks.fitted(data, turns, width, height), masks.SUFFIXES[0]
            facts.append((len(data), checksum(data)))
            yield f".{name}{suffix}", data
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
        facts = zip(self.mask_facts.items(), places, strict=False)
        return masks.placed(
            table,
            {name: [(*fact, at) for fact, at in zip(mine, offsets, strict=True)] for (name, mine), offsets in facts},
        )
