"""Container files and the ReFrame check name what is there. Neither images nor ReFrame are at hand here."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from hpc_lbsgd import cli
from hpc_lbsgd.bench.scaling import show

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools" / "containers"
DOCKER, APPTAINER = (FOLDER / "Dockerfile").read_text(), (FOLDER / "hpc_lbsgd.def").read_text()
COPIED = [word for line in re.findall(r"^COPY (.+) \S+$", DOCKER, re.M) for word in line.split()]
FILES = dict(line.split() for line in re.search(r"%files\n((?:    .+\n)+)", APPTAINER)[1].strip().split("\n"))
PAGE = (ROOT / "docs" / "containers.md").read_text()
CHECK = ROOT / "tools" / "reframe_check.py"


def test_both_take_the_same_files():
    assert set(COPIED) == set(FILES) and all((ROOT / path).exists() for path in COPIED)
    assert all(target == f"/opt/hpc_lbsgd/{path}" for path, target in FILES.items())
    assert "long_description = file: README.md" in (ROOT / "setup.cfg").read_text() and "README.md" in COPIED


@pytest.mark.parametrize("engine", ["horovod", "torch"])
def test_make_finds_all_that_it_wants_among_the_files_copied(engine, tmp_path):
    for path in COPIED:
        (tmp_path / path).symlink_to(ROOT / path)
    words = ["make", "--dry-run", "setup", f"ENGINE={engine}", "MPI=wheel"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "pip" in result.stdout, result.stderr


def test_instructions_are_docker_s_and_sections_are_apptainer_s():
    joined = DOCKER.replace("\\\n", "")
    words = {line.split()[0] for line in joined.splitlines() if line and not line.startswith("#")}
    assert words <= {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "ENTRYPOINT", "CMD"}
    assert re.findall(r"^%(\w+)$", APPTAINER, re.M) == [
        "arguments", "files", "post", "environment", "runscript", "test"]  # fmt: skip
    assert set(re.findall(r"apt-get install (.+?)(?: \\)?$", DOCKER, re.M)) == set(
        re.findall(r"apt-get install (.+)$", APPTAINER, re.M)
    )


@pytest.mark.parametrize("text", [DOCKER, APPTAINER, PAGE], ids=["Dockerfile", "hpc_lbsgd.def", "page"])
def test_targets_and_paths_that_are_named_exist(text):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.M)[1].split()
    for target, variable in re.findall(r"(?<!g\+\+ )make (\w+)(?: (\w+)=)?", text):
        assert target in targets and (not variable or f"{variable} " in makefile)
    for path in re.findall(r"\b(?:tools|docs)/[\w./]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_page_says_that_nothing_was_built():
    assert "**Not built here**" in PAGE


def test_the_reframe_check_reads_what_bench_scaling_prints():
    names = {n.targets[0].id: n.value for n in ast.walk(ast.parse(CHECK.read_text())) if isinstance(n, ast.Assign)
             and isinstance(n.targets[0], ast.Name)}  # fmt: skip
    pattern = ast.literal_eval(names["LINE"])
    row = {"mode": "weak", "ranks": 8, "nodes": 2, "images_per_s": 1234.56, "efficiency": 0.91}
    (line,) = show.lines({"rows": [row], "baseline_ranks": 1})
    found = re.search(pattern.format(mode="weak", ranks=8), line)
    assert (float(found["rate"]), float(found["efficiency"])) == (1234.6, 0.91)
    assert not re.search(pattern.format(mode="weak", ranks=1), line)
    words = ["bench", "scaling", "--mode", "weak", "--ranks", "1,2", "--steps", "20", "--rounds", "5"]
    words += ["--out", "scaling", "--oversubscribe"]
    assert cli.parser().parse_args(words) and all(w in CHECK.read_text() for w in words if w.startswith("--"))
    assert '["doctor", "--mpi"]' in CHECK.read_text() and cli.parser().parse_args(["doctor", "--mpi"])
