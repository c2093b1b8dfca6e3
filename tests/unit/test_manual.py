"""Every command of the manual is one that there is (manual_checks.py), and every block holds what it says."""

import ast
import contextlib
import html
import json
import re
import shlex

import markdown  # tensorboard has it, and so does mkdocs
import pytest
from manual import PAGES, ROOT, asked, blocks, commands
from manual_checks import Checks

import hpc_lbsgd
from hpc_lbsgd import recipe, yaml12
from hpc_lbsgd.cluster.sites import Site


@pytest.fixture
def checks(tmp_path, monkeypatch) -> Checks:
    monkeypatch.chdir(ROOT)
    return Checks(tmp_path, monkeypatch)


def test_every_command_in_the_manual_is_one_that_there_is(checks, capsys):
    wrong, count = [], 0
    for page in PAGES:
        for line, words in commands(page):
            count += 1
            try:
                checks.check(words)
            except (Exception, SystemExit) as problem:
                said = capsys.readouterr().err.splitlines()[-1:] or repr(problem).split("\\n")
                wrong.append(f"{page.relative_to(ROOT)}:{line}: {shlex.join(words)}: {said[0]}")
    assert not wrong, "\n".join(wrong)
    assert count > 350


WRONG = """
hpc-lbsgd trian fashion-mnist
hpc-lbsgd launch --np 2 -- train RECIPE --ste optim.base_lr=1
python tools/gone.py
python tools/step_costs.py
python tools/gpu_table.py --batch 8
python tools/fixed_point_costs.py --samples 3
python -m hpc_lbsgd.cil
make tets
make test PATR=mpi
make test PART=mip
make gpu-check PART=mpi
make faults PART=row
make faults COUNT=some
sbatch --node=2 slurm/train.sbatch RECIPE
sbatch --nodes=2 slurm/trian.sbatch RECIPE
sbatch --nodes=2 slurm/train.sbatch RECIPE --ste optim.base_lr=1
sbatch --nodes=2 slurm/scaling.sbatch RECIPE --outs runs/scaling
sbatch --nodes=2 slurm/reproduce.sbatch goyal-table7
sbatch --nodes=2 slurm/data.sbatch idnex DIR
srun --cpu-per-task=8 hpc-lbsgd doctor
salloc --nodes=2 hpc-lbsgd doctor --mip
srun sh -c 'hpc-lbsgd data index DIR --parts $SLURM_PROCID/$SLURM_NTASKS'
mpirun -np 2 python tools/reduce_scatter_costs.py nccl
torchrun --procs-per-node 8 -m -- hpc_lbsgd.cli train RECIPE
torchrun --nproc-per-node 8 -m hpc_lbsgd.cli train RECIPE --run runs/RUN
module load hpc-lbsgd
module use /apps/modulefiles/lua
pip install hpc_lbsgd[gpu]
pip install horovod==0.27
pip download -c constraint.txt torch
pip install --quite torch
docker build -f tools/Dockerfile -t hpc_lbsgd .
docker run --rm hpc_lbsgd docter
apptainer build hpc_lbsgd.sif tools/hpc_lbsgd.def
apptainer run --nv hpc_lbsgd.sif docter
reframe -c tools/reframe_check.py -n Scalling
touch RUN/halt
scancel --signal=HUP JOB
qsub job.pbs
"""


def test_each_check_finds_what_is_wrong(checks):
    missed = []
    for _, words in asked(WRONG.splitlines()):
        with contextlib.suppress(Exception, SystemExit):
            checks.check(words)
            missed.append(words)
    assert missed == []


@pytest.mark.parametrize(
    "lines, said",
    [
        (["if a; then b", "else c", "fi"], ":4: the shell does not come to all of it"),
        (["a || b"], ":3: the shell does not come to all of it"),
        (["a && b \\", "  c  # or else", "for i in 1 2; do", "echo $i", "done"], None),
        (["make $NONE"], "NONE: unbound variable"),
        (["make 'test"], "unexpected EOF"),
        (["cd /tmp", "./x"], None),
    ],
)
def test_a_line_that_no_check_would_see_is_refused(lines, said, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(["# t", "", *(f"    {line}" for line in lines), ""]))
    with pytest.raises(AssertionError, match=re.escape(said)) if said else contextlib.nullcontext():
        commands(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_site_s_reader_finds_the_same_blocks(page):
    """Code inside a list is a paragraph to one of the two, and its lines run together."""
    site = markdown.markdown(page.read_text(), extensions=["toc", "tables", "fenced_code"])  # mkdocs' own
    theirs = [html.unescape(text).strip("\n") for text in re.findall(r"<pre><code[^>]*>(.*?)</code>", site, re.S)]
    assert [block.text.strip("\n") for block in blocks(page)] == theirs


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_say_what_they_hold_and_hold_it(page):
    """Recipes and site files are valid, Python is, and the names it asks of us are there."""
    for block in blocks(page):
        where, text = f"{page.name}:{block.line}", block.text
        assert block.language in ("sh", "python", "yaml", "json", "text"), where
        if block.language == "yaml":
            read(yaml12.mapping(text, where), where)
        if block.language == "json":
            json.loads(text)
        if block.language == "python":
            names = re.findall(r"\b(?:lb|hpc_lbsgd)\.([A-Za-z]\w*)", ast.unparse(ast.parse(text)))
            assert [name for name in names if not hasattr(hpc_lbsgd, name)] == [], where


def read(values: dict, where: str) -> None:
    """Of a site or of a recipe, whose other keys have their defaults."""
    if set(values) <= set(Site.model_fields):
        Site.model_validate(values)
    else:
        recipe.validate(values)
