"""A bit that changes in a manifest or in a checkpoint's state is found, wherever it lies."""

import json
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_images

from hpc_lbsgd.data import pack, tree
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest, content_digest
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Decision
from hpc_lbsgd.records import RunFolder, cut_metrics, json_line, read_metrics
from hpc_lbsgd.theory.noise import Measurement
from hpc_lbsgd.train import checkpoint

# In a process of its own: a column whose offsets lead out of it ends the process where it is read unchecked.
LOOK = """
import sys
from pathlib import Path
from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.errors import RequestError
for number in range(int(sys.argv[2])):
    path = Path(sys.argv[1]) / f"{number}.arrow"
    try:
        found = Manifest(path)
        found.check_content()
        keys = [found.key(i) for i in range(len(found))]
        print("same", found.fingerprint, found.classes, keys, found.labels.tolist(), found.checksums.tolist())
    except RequestError as problem:
        print("refused")
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_bit_of_a_manifest(tmp_path, packed):
    root, rng, cases = write_images(tmp_path / "set", 12, 8), random.Random(5), 150
    tree.index(root, processes=1)
    if packed:
        pack.pack(root, tmp_path / "packed", pack.Encoding(), 0.004, 1)
        root = tmp_path / "packed"
    content = (root / FILE_NAME).read_bytes()
    for number in range(cases):
        changed, place = bytearray(content), rng.randrange(len(content))
        changed[place] ^= (1 << rng.randrange(8)) if number else 0
        (root / f"{number}.arrow").write_bytes(changed)
    result = subprocess.run([sys.executable, "-c", LOOK, root, str(cases)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == cases and said[0].startswith("same") and set(said) == {said[0], "refused"}
    assert said.count("refused") > cases // 2  # the others lie in padding
    Manifest(root / FILE_NAME).check_content()


def test_a_bit_of_a_state(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"weights")
    state = checkpoint.State(7, "a", "b", decisions=[Decision(1, 4, 0.1)], noise=[Measurement(0.25, 2.0)])
    state.files = {"weights.pt": checkpoint.file_sha256(tmp_path / "weights.pt")}
    content = (json.dumps(checkpoint.signed(vars(state)), indent=1) + "\n").encode()
    (tmp_path / "state.json").write_bytes(content)
    assert checkpoint.read_whole(tmp_path) == state
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (tmp_path / "state.json").write_bytes(changed)
            try:
                assert checkpoint.read_whole(tmp_path) == state, (place, bit)
            except (ValueError, OSError):
                continue


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"step": -1}, "step: "),
        ({"step": "7"}, "step: "),
        ({"decisions": [[1, 4]]}, "decisions.0"),
        ({"noise": {"a": 1}}, "noise: "),
        ({"files": []}, "files: "),
        ({"later": 1}, "later: "),
        ({"step": 9}, "of step 9, by another name"),
    ],
)
def test_a_state_that_was_edited_is_passed_over(tmp_path, wrong, said):
    """And signed again, or of a version that did not sign; a resume would end in a traceback, or go on elsewhere."""
    run = RunFolder(tmp_path)
    for step in (5, 7):
        folder = run.checkpoints / checkpoint.name_of(step)
        folder.mkdir(parents=True)
        (folder / "weights.pt").write_bytes(b"weights")
        files = {"weights.pt": checkpoint.file_sha256(folder / "weights.pt")}
        content = vars(checkpoint.State(step, "a", "b", files=files)) | (wrong if step == 7 else {})
        (folder / "state.json").write_text(json.dumps(checkpoint.signed(content) if "later" in wrong else content))
    path, state, (problem,) = checkpoint.find_newest(run)
    assert state.step == 5 and path.name == checkpoint.name_of(5) and said in problem


def test_a_file_of_no_tensors_is_refused(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(RequestError, match="not a file of tensors"):
        checkpoint.read(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "column, value, said",
    [
        ("offset", 2**62, "cannot be where it says"),
        ("bytes", 2**40, "cannot be where it says"),
        ("shard", 7, "cannot be where it says"),
        ("shard", -1, "cannot be where it says"),
        ("path", None, "a row without a value"),
        ("label", 9, "a label is 9"),
        ("shards", [{"name": "shard-000000.tar"}], "shards.0.bytes"),
        ("shards", [{"name": "a\0b", "bytes": 1}], "shards.0.name"),
        ("shards", [{"name": "/etc/a.tar", "bytes": 1}], "shards.0.name"),  # staging would remove what is not it
        ("shards", [{"name": "../a.tar", "bytes": 1}], "shards.0.name"),
        ("shards", [{"name": "..", "bytes": 1}], "shards.0.name"),
        ("classes", [1, 2], "classes.0"),
        ("root", None, "root"),
    ],
)
def test_an_index_that_was_edited_is_refused(tmp_path, column, value, said):
    """With a digest that fits, or without one."""
    tree.index(write_images(tmp_path / "images", 6, 8), processes=1)
    pack.pack(tmp_path / "images", tmp_path / "packed", pack.Encoding(), 1, 1)
    path = tmp_path / "packed" / FILE_NAME
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    header = json.loads(table.schema.metadata[b"hpc_lbsgd"])
    if column in table.column_names:
        place, values = table.column_names.index(column), table.column(column).to_pylist()
        table = table.set_column(place, table.field(column), pa.array([*values[:-1], value], table.field(column).type))
    else:
        header[column] = value
    header["digest"] = None if value is None else content_digest(table, header)
    table = table.replace_schema_metadata({"hpc_lbsgd": json.dumps(header)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    with pytest.raises(RequestError, match=said):
        Manifest(path).check_files()


def test_a_bit_of_the_metrics(tmp_path):
    """Whatever it makes of a line, the other records are read, and a resume can cut the file."""
    folder, steps = RunFolder(tmp_path), [{"kind": "step", "step": i, "loss": 0.5} for i in range(3)]
    content = "".join(json_line(step) for step in steps).encode()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            folder.metrics.write_bytes(changed)
            assert sum(record in steps for record in read_metrics(folder.metrics)) >= 1
            if bit == place % 8:
                cut_metrics(folder, 2)
    for line in (b"[1]", b"7", b'{"kind": 1}', b'{"kind": "step", "step": "x"}', b"[" * 100_000, b"\xff"):
        folder.metrics.write_bytes(line + b"\n" + content)
        assert list(read_metrics(folder.metrics)) == steps


def test_a_damaged_index_is_not_packed(tmp_path):
    """A pack has a digest of its own, which would vouch for it."""
    m = tree.index(write_images(tmp_path / "images", 8, 8), processes=1)
    content, labels = bytearray(m.path.read_bytes()), np.array(m.labels, np.int32).tobytes()
    content[content.index(labels)] ^= 1  # a label, and still one
    m.path.write_bytes(content)
    with pytest.raises(RequestError, match="what is in it is not what was written"):
        pack.pack(m.path, tmp_path / "packed", pack.Encoding(), 1, 1)
    assert not (tmp_path / "packed").exists()
