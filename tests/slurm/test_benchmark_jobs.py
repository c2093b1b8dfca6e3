"""Benchmarks as jobs on a real Slurm of 32 nodes."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import write_recipe
from lab import log_of, site, submitted

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling-study.md"
NODES = (1, 2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


def test_slurm_takes_a_sweep(lab, folder):
    sweep = f"nodes={','.join(map(str, NODES))}"
    result = lab.command("submit", "goyal-resnet50", "--sweep", sweep, "--site", "lab", "--test-only", cwd=folder)
    for processors in [n * 8 for n in NODES]:
        assert f"using {processors} processors" in result.stderr, result.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("template", ["scaling", "allreduce"])
def test_slurm_takes_the_templates_by_hand(lab, template, folder):
    for nodes in NODES:
        script = ROOT / "slurm" / f"{template}.sbatch"
        said = lab.call("sbatch", "--test-only", f"--nodes={nodes}", script, "x", cwd=folder).stderr
        assert f"using {nodes * 8} processors" in said


def test_a_sweep_on_1_and_2_nodes_ends_in_one_report(lab, folder):
    """docs/scaling-study.md, as it is written, on a recipe and jobs that are small. A third size fails: it is named,
    and hides nothing of the others."""
    stub = folder / "not-on-3"
    stub.write_text(f'#!/bin/sh\n[ "$SLURM_JOB_NUM_NODES" = 3 ] && exit 1\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    tiny = {"model": {"name": "resnet8", "widths": [8, 8, 8]}, "batch": {"samples_per_worker": 2}}
    write_recipe(folder / "tiny.yaml", tiny | {"data": {"image_size": 8, "classes": 4}})
    site(folder, "my-site", ranks_per_node=1, python=str(stub))
    asked, page = (line.split() for line in re.findall(r"hpc-lbsgd ((?:submit|report) .+)", PAGE.read_text()))
    small = {"goyal-resnet50": "tiny.yaml", "nodes=1,2,4,8,16,32": "nodes=1,2,3", "5": "1"}
    result = lab.command(*(small.get(word, word) for word in asked), "--steps", 2, cwd=folder)
    run, numbers = folder / page[1], submitted(result.stderr)
    states = [lab.wait(n, 200)["JobState"] for n in numbers]
    logs = "".join(log_of(lab, n) for n in numbers)
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "FAILED"], logs
    result = json.loads((run / "results.json").read_text())
    assert {(r["mode"], r["ranks"], r["nodes"]) for r in result["rows"]} == {
        (mode, n, n) for mode in ("weak", "strong") for n in (1, 2)
    }
    assert result["missing_ranks"] == [3] and "no result on 3 ranks" in log_of(lab, numbers[3])
    assert {r["global_batch"] for r in result["rows"] if r["mode"] == "strong"} == {6}
    assert result["rows"][1]["slowest_host"].startswith("node")
    assert "scaling: mode=weak ranks=2 nodes=2 images_per_s=" in log_of(lab, numbers[3])
    assert (run / "scaling.png").exists()
    assert lab.command(*page, cwd=folder).stdout.strip() == f"{page[1]}/report.html"
    assert "no result on 3 ranks" in (run / "report.html").read_text()


def test_allreduce_on_2_nodes_by_srun(lab, folder):
    words = [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=0",  # those of the lab are not there
        f"--output={folder}/allreduce.log",
        ROOT / "slurm" / "allreduce.sbatch",
    ]
    more = ["--algorithms", "horovod,mpi-ring", "--bytes", "1KB,16KB", "--rounds", 1, "--seconds", 0.01]
    active = {"PATH": f"{Path(sys.executable).parent}:{lab.env['PATH']}"}
    (number,) = submitted(lab.call("sbatch", *words, *more, cwd=folder, env=active).stdout)
    assert lab.wait(number, 120)["JobState"] == "COMPLETED", log_of(lab, number)
    assert "2 ranks" in log_of(lab, number) and "mpi-ring" in log_of(lab, number)
