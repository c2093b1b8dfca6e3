"""A bit that changes in a manifest or in a checkpoint's state is found, wherever it lies."""

import json
import random
import subprocess
import sys

import pytest
from conftest import write_images

from hpc_lbsgd.data import pack, tree
from hpc_lbsgd.data.manifest import FILE_NAME, Manifest
from hpc_lbsgd.records import RunFolder, cut_metrics, json_line, read_metrics
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
    state = checkpoint.State(7, "a", "b", decisions=[[1, 4, 0.1]], noise=[[0.25, 2.0]])
    state.files = {"weights.pt": checkpoint.file_sha256(tmp_path / "weights.pt")}
    content = (json.dumps(checkpoint.signed(vars(state)), indent=1) + "\n").encode()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (tmp_path / "state.json").write_bytes(changed)
            try:
                assert checkpoint.read_whole(tmp_path) == state, (place, bit)
            except (ValueError, OSError):
                continue


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
