"""`data pack` of a set of the user's own: what its code gives, in shards (shards.py), to be read without that code.

A sample's numbers lie in one .npy file, as a record: `input` and `label`, or `input.NAME` and `label.NAME`; bytes lie
in files of their own beside it. Types and shapes are those of the first sample, kept in the manifest's header, and a
record is read by them alone.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from hpc_lbsgd.data import fields, files
from hpc_lbsgd.data import manifest as manifests
from hpc_lbsgd.data.manifest import PACKED_SCHEMA, Manifest, checksum
from hpc_lbsgd.data.shards import TAR_BLOCK, Put
from hpc_lbsgd.data.storage import SampleError, open_storage
from hpc_lbsgd.data.targets import Inputs, Targets
from hpc_lbsgd.data.user import UserSet
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.imports import place_of

SIDES = ("input", "label")
BYTES = "bytes"


class Part(NamedTuple):
    """What each sample has under one name. dtype: numpy's, or bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


class NoDraws:
    """In place of a generator: what is drawn from it is another in each epoch, and cannot be packed."""

    def __getattr__(self, name: str):
        raise RequestError(
            "draws from `rng`, and what is random is another in each epoch: it cannot be packed. Pack a set without "
            "it, and draw in the model, or leave it as data.dataset"
        )


def leaves(sample: tuple[Inputs, Targets]) -> dict[str, np.ndarray | bytes]:
    """A sample's parts by name. Raises ValueError for numbers that a file of arrays cannot hold."""
    found: dict[str, np.ndarray | bytes] = {}
    for side, held in zip(SIDES, sample, strict=True):
        for name, value in held.items() if isinstance(held, dict) else [("", held)]:
            if isinstance(held, dict) and not (isinstance(name, str) and name):
                raise ValueError(f"has {name!r} among the names of its {side}s; a name is a text")
            key = f"{side}.{name}" if name else side
            if not isinstance(value, bytes) and value.dtype == torch.bfloat16:
                raise ValueError(f"{key} is bfloat16, which no file of arrays holds; give float32")
            found[key] = value if isinstance(value, bytes) else value.detach().cpu().numpy()
    return found


def described(found: dict[str, np.ndarray | bytes]) -> list[Part]:
    return [Part(n, BYTES) if isinstance(v, bytes) else Part(n, v.dtype.str, v.shape) for n, v in found.items()]


def parts_of(sample: tuple[Inputs, Targets]) -> list[Part]:
    """Raises ValueError for what cannot be packed."""
    found = described(leaves(sample))
    for part in found:
        if "/" in part.name or len(part.name.encode()) > fields.LONGEST_NAME:
            raise ValueError(f"{part.name!r} is part of the names of files: make it short, without /")
    if not record_of(found).itemsize:
        raise ValueError("has bytes alone, or empty arrays; give a number too, such as a label")
    return found


def record_of(parts: list[Part]) -> np.dtype:
    return np.dtype([part for part in parts if part.dtype != BYTES])


class Own:
    """One part, train or eval, of a set of the user's own, to be packed."""

    def __init__(self, name: str, part: str):
        self.name, self.part = name, part
        own = UserSet(name, part)
        if not len(own):
            raise RequestError(f"data.dataset = {name}: its part {part!r} has no samples")
        self.samples, self.classes, self.fingerprint = len(own), own.classes, own.fingerprint
        first = self._sample(own, 0)
        self.parts = self._checked(0, lambda: parts_of(first))
        self.first = checksum(self._record(leaves(first)))
        sizes = [len(v) if isinstance(v, bytes) else v.nbytes for v in leaves(first).values()]
        self.bytes_expected = sum(sizes) + 3 * TAR_BLOCK

    def _checked(self, index: int, function):
        try:
            return function()
        except ValueError as problem:
            raise RequestError(f"{self._at(index)} {problem}") from None

    def _at(self, index: int) -> str:
        return f"data.dataset = {self.name}: sample {index} of {self.part!r}"

    def _sample(self, own: UserSet, index: int) -> tuple[Inputs, Targets]:
        try:
            return own.given(index, NoDraws())
        except RequestError as problem:
            raise RequestError(f"{self._at(index)} {problem}") from None
        except Exception as problem:  # of anyone's code
            told = f"{type(problem).__name__}: {problem}{place_of(problem)}"
            raise RunError(f"{self._at(index)}: {told}") from None

    def request(self) -> dict:
        """The first sample tells of a changed code, where the set itself does not."""
        return {"source": self.fingerprint, "dataset": self.name, "part": self.part, "first": self.first}

    def cuts(self, shard_bytes: float) -> list[tuple[int, int]]:
        """As many samples as would fill a shard if all were as large as the first."""
        each = max(1, int(shard_bytes / self.bytes_expected))
        return [(first, min(first + each, self.samples)) for first in range(0, self.samples, each)]

    def write(self, number: int, first: int, last: int, put: Put) -> pa.Table:
        own = UserSet(self.name, self.part)
        if own.fingerprint != self.fingerprint:
            raise RunError(
                f"data.dataset = {self.name}: made a second time it is another set (its length or `fingerprint`); what "
                "is random in it must be seeded"
            )
        rows: dict[str, list] = {field: [] for field in PACKED_SCHEMA.names}
        beside: dict[str, list[tuple[str, files.Seen, int]]] = {p.name: [] for p in self.parts if p.dtype == BYTES}
        for index in range(first, last):
            sample = self._sample(own, index)
            found = self._checked(index, lambda sample=sample: leaves(sample))
            self._refuse_other(index, found)
            data, label = self._record(found), found.get("label")
            stem = f"{index:09d}"
            offset = put(f"{stem}.npy", data)
            for name, kept in beside.items():
                content = found[name]
                at = put(f"{stem}.{name}.bin", content)
                kept.append((f"{stem}.{name}.bin", (0, 0, len(content), checksum(content), 0), at))
            known = isinstance(label, np.ndarray) and label.shape == () and label.dtype.kind in "iu"
            known = known and 0 <= label < len(self.classes)  # others are for the loss, which may ignore them
            row = (f"{stem}.npy", int(label) if known else 0, 0, 0, len(data), checksum(data), None, number, offset)
            for field, value in zip(PACKED_SCHEMA.names, row, strict=True):
                rows[field].append(value)
        table = pa.table(rows, schema=PACKED_SCHEMA)
        for name, kept in beside.items():
            table = manifests.with_columns(table, files.table_of(BYTES, name, *map(list, zip(*kept, strict=True)))[0])
        return table

    def _record(self, found: dict) -> bytes:
        record = np.zeros((), record_of(self.parts))
        for name in record.dtype.names:
            record[name] = found[name]
        out = io.BytesIO()
        np.save(out, record, allow_pickle=False)
        return out.getvalue()

    def _refuse_other(self, index: int, found: dict) -> None:
        """A record has one layout: what the first sample has."""
        own = {part.name: part for part in described(found)}
        for part in self.parts:
            if own.get(part.name) != part:
                raise RunError(
                    f"{self._at(index)}: {part.name} is {said(own.get(part.name))}, and {said(part)} in the first"
                )
        if more := set(own) - {part.name for part in self.parts}:
            raise RunError(f"{self._at(index)}: has {min(more)}, which the first has not")

    def header(self) -> dict:
        return {"classes": self.classes, "own": [[part.name, part.dtype, list(part.shape)] for part in self.parts]}


def said(part: Part | None) -> str:
    if part is None:
        return "not there"
    return part.dtype if part.dtype == BYTES else f"{np.dtype(part.dtype)} {part.shape}"


# ---------------------------------------------------------------- reading


class PackedSet:
    """Samples of such shards, as the set's own code gave them. Raises RequestError for a header that says no layout."""

    def __init__(self, manifest: Manifest):
        self.manifest, self.storage = manifest, open_storage(manifest)
        try:
            self.parts = [Part(name, dtype, tuple(shape)) for name, dtype, shape in manifest.own]
            self.record = record_of(self.parts)
            if any(p.dtype != BYTES and np.dtype(p.dtype).kind not in "biufc" for p in self.parts):
                raise ValueError("numbers alone are read")
            if {p.name.partition(".")[0] for p in self.parts} != set(SIDES):
                raise ValueError("an input and a label are expected")
        except (TypeError, ValueError, KeyError, AttributeError) as problem:
            raise RequestError(f"{manifest.path}: not a packed set ({problem}); pack it again") from None

        self.files = [None, *(part.name for part in self.parts if part.dtype == BYTES)]  # that a sample is read from

    def __len__(self) -> int:
        return len(self.manifest)

    def sample(self, index: int, seed: int, epoch: int) -> tuple[Inputs, Targets]:
        """(input, label), whatever seed and epoch: nothing in it is random. Raises SampleError where it cannot be
        had."""
        content = self.storage.content(index)
        if len(content) < self.record.itemsize:
            raise SampleError(index, f"{self.manifest.file(index)}: {len(content)} bytes are no sample of this set")
        record = np.frombuffer(content[len(content) - self.record.itemsize :].tobytes(), self.record)[0]
        found = {part.name: self._part(part, record, index) for part in self.parts}
        inputs, labels = (side_of(side, found) for side in SIDES)
        return inputs, labels

    def _part(self, part: Part, record: np.void, index: int) -> torch.Tensor | bytes:
        if part.dtype == BYTES:
            return self.storage.content(index, part.name).tobytes()
        return torch.from_numpy(np.array(record[part.name]))


def side_of(side: str, found: dict) -> Inputs:
    """The input or the label among parts by name."""
    if side in found:
        return found[side]
    return {name.removeprefix(f"{side}."): value for name, value in found.items() if name.startswith(f"{side}.")}
