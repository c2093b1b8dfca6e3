"""Jobs whose ranks have their environment on their node's own disk."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import changed, records, write_environment, write_recipe
from lab import log_of, site, submit

from hpc_lbsgd.cluster import sites
from hpc_lbsgd.cluster.jobs import Request
from hpc_lbsgd.cluster.submission import prepare
from hpc_lbsgd.errors import RequestError

ROOT = Path(__file__).parents[2]
# Each rank says where its Python and this package are
MODEL = """\
import json, os, socket, sys
import hpc_lbsgd
from torch import nn

def model(channels, classes):
    host = socket.gethostname()
    with open(f"said/{os.environ['SLURM_JOB_ID']}-{host}-{os.getpid()}", "w") as file:
        json.dump([host, sys.prefix, hpc_lbsgd.__file__], file)
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Jobs are submitted from here, as from a checkout: this package lies in it, and is not the one that is packed."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "where.py").write_text(MODEL)
    (folder / "said").mkdir()
    (folder / "hpc_lbsgd").symlink_to(ROOT / "hpc_lbsgd")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return write_environment(tmp_path_factory.mktemp("environment") / "my env")


@pytest.fixture(scope="module")
def bundle(environment, folder):
    target = folder / "my environment.tar"
    words = [environment / "bin" / "python", "-m", "hpc_lbsgd.cli", "bundle", target]
    subprocess.run(words, check=True, capture_output=True, cwd=folder)
    return target


def test_ranks_have_their_python_on_their_nodes_disk_and_the_next_job_finds_it(
    lab, small_recipe, folder, environment, bundle
):
    recipe = changed(small_recipe, data__eval=None, train__max_steps=2, model={"name": "where:model"})
    path = write_recipe(folder / "r.yaml", recipe)
    python = str(environment / "bin" / "python")
    nodes = ["node07", "node09"]
    for launcher, unpacked, there in (("srun", 2, 0), ("mpirun", 0, 2)):
        ranks = 2 if launcher == "srun" else 1
        more = {"options": [f"--nodelist={','.join(nodes)}"], "ranks_per_node": ranks, "python": python}
        own = site(folder, launcher, bundle=str(bundle), stage_dir="/tmp/$USER-disk", launcher=launcher, **more)
        env = {"PYTHONPATH": str(folder), "USER": "me", "PATH": f"{Path(sys.executable).parent}:{lab.env['PATH']}"}
        words = ["submit", path, "--run", folder / launcher, "--nodes", 2, "--site", own]
        said = lab.call(python, "-m", "hpc_lbsgd.cli", *words, cwd=folder, env=env)
        number = re.search(r"Submitted batch job (\d+)", said.stderr)[1]
        assert lab.wait(number, 240)["JobState"] == "COMPLETED", log_of(lab, number)
        assert f"unpacked on {unpacked} nodes, there before on {there}" in log_of(lab, number)
        found = [json.loads(p.read_text()) for p in (folder / "said").glob(f"{number}-*")]
        assert sorted(host for host, _, _ in found) == sorted(ranks * nodes)
        (prefix,) = {prefix for _, prefix, _ in found}
        assert re.fullmatch(r"/tmp/me-disk/\d+-bundle-[0-9a-f]{16}/env", prefix)
        assert all(Path(program).is_relative_to(prefix) for _, _, program in found)
        assert records(folder / launcher, "start")[0]["ranks"] == 2 * ranks
        assert not Path(prefix).exists()  # on this machine: it is on the nodes' disks alone


def test_a_disk_without_room_and_a_damaged_bundle_end_a_job_in_a_line(lab, folder, environment, bundle):
    damaged = folder / "damaged.tar"
    content = bytearray(bundle.read_bytes())
    content[-30_000] ^= 1
    damaged.write_bytes(content)
    lab_disk = {"bundle": str(bundle), "stage_dir": "/proc/no-disk"}
    cases = (
        ("full", lab_disk, r"hpc-lbsgd: node\d+: stage_dir: cannot write /proc/no-disk/"),
        ("damaged", {**lab_disk, "bundle": str(damaged), "stage_dir": "/tmp/x"}, "not the bytes that were packed"),
    )
    numbers = []
    for name, keys, _ in cases:
        own = site(folder, name, ranks_per_node=1, python=str(environment / "bin" / "python"), **keys)
        numbers += submit(lab, "goyal-resnet50", folder / name, "--site", own, cwd=folder)
    for number, (name, keys, said) in zip(numbers, cases, strict=True):
        facts, log = lab.wait(number), log_of(lab, number)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "1:0", "0"), log
        assert re.search(said, log) and f"no node could unpack {keys['bundle']}" in log and "Traceback" not in log
        assert not (folder / name / "owner.json").exists()


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"bundle": "x.tar"}, "bundle = x.tar without stage_dir: say where nodes have a disk"),
        ({"bundle": "x.tar", "stage_dir": "/l", "scheduler": "pbs"}, "bundle = x.tar: not with scheduler = pbs: "),
        ({"bundle": "x.tar", "stage_dir": "/l", "scheduler": "lsf"}, "bundle = x.tar: not with scheduler = lsf: "),
        ({"bundle": "x.tar", "stage_dir": "/l", "container": {"runtime": "apptainer", "image": "i"}}, "an image has"),
    ],
)
def test_where_there_is_no_way_a_bundle_is_refused(keys, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        sites.read(str(site(tmp_path, **keys)))


def test_submit_looks_at_the_bundle(tmp_path, bundle, monkeypatch):
    monkeypatch.setenv("DISK", str(tmp_path))

    def prepared(name):
        own = site(tmp_path, name, ranks_per_node=1, bundle=f"$DISK/{name}.tar", stage_dir="/local")
        return prepare("goyal-resnet50", [], str(own), Request(run=str(tmp_path / "run")))

    for name, content in (("none", b"x" * 9000), ("cut", bundle.read_bytes()[:-10_000])):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(
            RequestError, match=f"bundle = {tmp_path}/{name}.tar: no bundle of this version, or damaged"
        ):
            prepared(name)
    with pytest.raises(FileNotFoundError):
        prepared("gone")
    (tmp_path / "whole.tar").symlink_to(bundle)
    assert f"bundle={tmp_path}/whole.tar\n" in prepared("whole").texts[0]
