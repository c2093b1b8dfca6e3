"""Run by test_field_mutants.py: mutants of tables, tars, manifests and shards with fields of every kind, each read to
its end. Prints what ended otherwise than well or by one message, then how many did what."""

import json
import random
import resource
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from conftest import write_images
from mutants import mutated
from PIL import Image

from hpc_lbsgd.data import archive, loader, manifest, own, pack, shards, table
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.recipe import Data

MEMORY, SECONDS = 8 * 2**30, 30
WANTED = ["x", "right:image", "caption:text", "sound:bytes", "mask", "boxes"]
DATA = Data(
    loader="torchvision", channels=1, mean=[0.0], std=[1.0], image_size=8, augment="flip",
    inputs=["image", "right", "caption"], targets=["x", "sound", "mask", "boxes"],
    encode={"caption": "field_mutants:length"},
)  # fmt: skip
VALUES = [None, -1, 10**12, "", "x", [], {}, [1], 1.5, True, "O", "<f4", [[]], "../..", [["input", "<f8", [10**9] * 3]]]


def length(text):
    return len(text)


class Own:
    classes = ["a", "b"]

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"x": np.full(3, index, np.float32), "note": bytes(index)}, index % 2


def mine(part):
    return Own()


def first(root):
    """A table of four samples, packs of it, and a pack of a set of its own."""
    images = sorted(write_images(root, 4, 8).rglob("*.png"))
    rows = []
    for i, path in enumerate(images):
        with Image.open(path) as image:
            image.save(root / f"{i}r.bmp")
            image.point(lambda grey: grey % 3).save(root / f"{i}m.png")
        (root / f"{i}.raw").write_bytes(bytes(i))
        row = {"path": str(path.relative_to(root)), "x": i, "right": f"{i}r.bmp", "mask": f"{i}m.png"}
        rows.append(row | {"caption": f"é {i}", "sound": f"{i}.raw", "boxes": [[0, 0, 2, 2]] * i})
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    m = table.index(root / "t.jsonl", processes=1, wanted=WANTED)
    keep = pack.pack(m.path, root / "keep", pack.Encoding(), 1, 1)
    raw = pack.pack(m.path, root / "raw", pack.Encoding("raw", channels=1), 1, 1)
    return m, keep, raw, shards.pack(own.Own("field_mutants:mine", "eval"), root / "own", 1, 1)


def read(path):
    """As a run does: checked, then every sample."""
    m = manifest.Manifest(path)
    m.check_files()
    loader.check_sizes(DATA, m, True)
    made = loader.create(DATA, m, 0, True, 4, 1, 1, False, torch.device("cpu"))
    list(made.batches([Request(0, np.arange(len(m)))]))


def as_long(content, rng):
    return mutated(content, rng)[: len(content)].ljust(len(content), b"\1")


def other_value(content, rng):
    """A manifest with one value of its header exchanged, and a digest that says it was so written."""
    found = pa.ipc.open_file(pa.py_buffer(content)).read_all()
    header, places = json.loads(found.schema.metadata[b"hpc_lbsgd"]), []

    def walk(held):
        for key in held.keys() if isinstance(held, dict) else range(len(held)):
            places.append((held, key))
            if isinstance(held[key], (dict, list)):
                walk(held[key])

    walk(header)
    held, key = rng.choice(places)
    held[key] = rng.choice(VALUES)
    header["digest"] = manifest.content_digest(found, header)
    found = found.replace_schema_metadata({"hpc_lbsgd": json.dumps(header)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, found.schema) as writer:
        writer.write_table(found)
    return sink.getvalue().to_pybytes()


def main(root, seed, count):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    m, keep, raw, own_set = first(root)
    shard = "shard-000000.tar"
    indexed = ((index, lambda p, index=index: read(index(p, processes=1, wanted=WANTED).path))
               for index in (table.index, archive.index))  # fmt: skip
    kinds = [(index.__module__, path, mutated, look)
             for (index, look), path in zip(indexed, (root / "t.jsonl", keep.root / shard), strict=True)]  # fmt: skip
    kinds += [(f"manifest of {s.path.parent.name}", s.path, change, read)
              for s in (m, keep, raw, own_set) for change in (mutated, other_value)]  # fmt: skip
    kinds += [(f"shard of {s.path.parent.name}", s.root / shard, as_long, None) for s in (keep, raw, own_set)]
    said = Counter()
    for kind, path, change, look in kinds:
        whole, rng = path.read_bytes(), random.Random(f"{seed} {kind} {change.__name__}")
        for number in range(count):
            case = path if look is None else path.with_name(f"case{path.suffix}")
            case.write_bytes(change(whole, rng))
            signal.alarm(SECONDS)
            try:
                (look or read)(case if look else path.with_name(manifest.FILE_NAME))
                said["read"] += 1
            except (RequestError, RunError):
                said["refused"] += 1
            except BaseException:
                print(f"seed {seed}, {kind} by {change.__name__}, case {number}:\n{traceback.format_exc()}")
            signal.alarm(0)
        path.write_bytes(whole)
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
