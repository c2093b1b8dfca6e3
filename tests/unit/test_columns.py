"""Manifests of any length: what a rank holds of one does not grow with it."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_images

from hpc_lbsgd.data import columns, manifest, names
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.manifest import PACKED_SCHEMA, Manifest


@pytest.mark.parametrize("pieces", [[7], [3, 0, 4, 1], [1] * 9])
@pytest.mark.parametrize("gone", [[], [0], [2, 3, 4], "last", "all but one"])
def test_rows_are_found_where_they_lie(pieces, gone):
    values = np.random.default_rng(0).integers(-99, 99, sum(pieces)).astype(np.int32)
    n = len(values)
    gone = {"last": [n - 1], "all but one": [i for i in range(n) if i != 3]}.get(str(gone), gone)
    chunks = np.split(values, np.cumsum(pieces)[:-1])
    table = pa.table({"x": pa.chunked_array([pa.array(c) for c in chunks], pa.int32())})
    found = columns.column(table, "x", columns.Rows(n, np.array(gone, np.int64)))
    expected = np.delete(values, gone)
    assert len(found) == len(expected) and found.dtype == np.int32
    assert np.asarray(found).tolist() == found.tolist() == expected.tolist() == [found[i] for i in range(len(found))]
    rng = np.random.default_rng(1)
    at = rng.integers(-len(expected), len(expected), 20)
    assert (found[at] == expected[at]).all() and (found[1:3] == expected[1:3]).all()
    assert (found[expected > 0] == expected[expected > 0]).all() and ((found != 3) == (expected != 3)).all()
    assert found[-1] == expected[-1] and (found[np.int64(0)] == expected[0])
    for wrong in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            found[wrong]


def test_excluded_rows_are_out_wherever_they_lie(tmp_path):
    m = trees.index(write_images(tmp_path, 12, 16), processes=1)
    keys = [m.key(i) for i in range(12)]
    names.add_excluded(tmp_path / names.EXCLUDE, [(keys[i], "odd") for i in (0, 5, 11)] + [("not/there", "odd")])
    less = Manifest(m.path)
    kept = [i for i in range(12) if i not in (0, 5, 11)]
    assert [less.key(i) for i in range(len(less))] == [keys[i] for i in kept]
    for name in ("labels", "sizes", "checksums", "orientations", "widths"):
        assert getattr(less, name).tolist() == getattr(m, name)[kept].tolist()
    assert less.excluded == [keys[i] for i in (0, 5, 11)] and less.fingerprint != m.fingerprint
    part = manifest.subset(less, tmp_path / "part.arrow", 9)
    assert [part.key(i) for i in range(len(part))] == [keys[i] for i in kept]


class Sparse:
    """A file in which zeros take no room."""

    closed = False

    def __init__(self, path):
        self.file = open(path, "wb")  # noqa: SIM115
        self.size = 0

    def write(self, data) -> int:
        view = memoryview(data)
        if len(view) > 2**16 and not np.frombuffer(view, np.uint8).any():
            self.file.seek(len(view), 1)
        else:
            self.file.write(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.truncate(self.size)
        self.file.close()


def generate(folder, samples: int, rows: int, paths: bool = True):
    """A packed set of one picture, listed `samples` times, `rows` to a piece: only the list is large."""
    m = trees.index(write_images(folder / "one", 1, 16, classes=1), processes=1)
    (folder / "shard.tar").write_bytes((folder / "one" / m.key(0)).read_bytes())
    size = int(m.sizes[0])
    header = {"root": ".", "classes": ["a", "b"], "fingerprint": "generated",
              "shards": [{"name": "shard.tar", "bytes": size, "checksum": None}]}  # fmt: skip
    schema = PACKED_SCHEMA.with_metadata({"hpc_lbsgd": json.dumps(header)})
    sink = Sparse(folder / "manifest.arrow")
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        for first in range(0, samples, rows):
            count = min(rows, samples - first)
            full = {"width": 16, "height": 16, "bytes": size, "orientation": 1}
            arrays = {f.name: np.full(count, full.get(f.name, 0), f.type.to_pandas_dtype()) for f in schema if
                      f.name != "path"}  # fmt: skip
            arrays["checksum"][:] = m.checksums[0]
            if paths:
                digits = np.char.zfill(np.arange(first, first + count).astype("S10"), 10)
                buffers = [None, pa.py_buffer(np.arange(count + 1, dtype=np.int64) * 10), pa.py_buffer(digits)]
            else:
                buffers = [None, pa.py_buffer(np.zeros(count + 1, np.int64)), pa.py_buffer(b"")]
            path = pa.Array.from_buffers(pa.large_string(), count, buffers)
            writer.write_batch(pa.record_batch([path, *arrays.values()], schema=schema))
    sink.close()
    return folder / "manifest.arrow"


OPEN = """
import json, sys, time
from hpc_lbsgd.data import loader, stage, order, storage  # what is imported is not what grows
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.recipe import Data
import numpy as np, torch
def own():  # MB of memory that is this process's alone: not pages of a mapped file
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
data = Data(loader="torchvision", channels=1, image_size=16, augment="flip", eval_resize=0, mean=[0.0], std=[1.0])
before, started, said = own(), time.perf_counter(), {}
def mark(name):
    said[name] = round(time.perf_counter() - started, 2)
m = Manifest(sys.argv[1]); mark("open")
m.check_files(); loader.check_sizes(data, m, True); stage.folder_of(m, "/nowhere"); mark("checked")
permutation = order.Permutation(len(m), 1, 0); some = permutation[:64]; mark("order")
made = loader.create(data, m, 1, True, 64, 1, 2, True, torch.device("cpu"))
list(made.batches(storage.Request(0, permutation[64 * i : 64 * i + 64]) for i in range(4))); mark("batches")
print(json.dumps({"samples": len(m), "seconds": said, "mb": own() - before, "spread": int(some.max())}))
"""


def opened(path) -> dict:
    job = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stderr
    return json.loads(job.stdout)


def test_a_ranks_memory_does_not_grow_with_the_set(tmp_path):
    """Ten million samples, in three pieces, one left out: opened, checked, ordered and read in as much memory as ten
    thousand."""
    said = {}
    for samples in (10_000, 10_000_001):
        (tmp_path / str(samples)).mkdir()
        path = generate(tmp_path / str(samples), samples, 4_000_000)
        (path.parent / "exclude.txt").write_text(f"{samples // 2:010d}\n")
        said[samples] = opened(path)
        assert said[samples]["samples"] == samples - 1
    assert said[10_000_001]["spread"] > 5_000_000
    assert said[10_000_001]["mb"] < said[10_000]["mb"] + 60, said  # a column of it has 40 or 80 MB, all have 560
