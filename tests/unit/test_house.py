"""The tree is as its pages say: the walk, files to touch, targets of make, heads of packages; and no file is long."""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import grimp
import pytest
import yaml

import hpc_lbsgd
from hpc_lbsgd import cli
from hpc_lbsgd import recipe as recipes
from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.parallel.launchers import FLAVOURS
from hpc_lbsgd.schedulers.known import INNERMOST_FIRST, SCHEDULERS
from hpc_lbsgd.sections import Machine, ScheduleSection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_file_is_longer_than_400_lines():
    written = [p for folder in ("hpc_lbsgd", "tools", "tests") for p in (ROOT / folder).rglob("*.py")]
    written += [ROOT / "Makefile", *(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "hpc_lbsgd").rglob("*.sbatch")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in written}
    assert len(lengths) > 200 and {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_the_root_has_no_stray_files():
    """What is committed; a recipe of one's own, as `init` writes it there, is nobody's business."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip(f"which files are the project's is not known: {git.stderr.strip()}")  # no clone, or another user's
    listed = git.stdout.splitlines()
    known = "setup.cfg setup.py pyproject.toml Makefile MANIFEST.in constraints.txt mkdocs.yml .gitignore "
    known += "README.md LICENSE CHANGELOG.md CITATION.cff CONTRIBUTING.md "
    known += ".ci/ docs/ hpc_lbsgd/ modules/ slurm/ tests/ tools/"
    roots = {f.split("/")[0] + ("/" if "/" in f else "") for f in listed}
    assert roots - set(known.split()) == set()


# ---------------------------------------------------------------- CONTRIBUTING.md


def source_of(path: str, name: str) -> str:
    """The source of a class, a function or `Class.method`."""
    text = (ROOT / path).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    return ast.get_source_segment(text, node)


def test_the_walk_to_the_sum_of_a_gradient():
    hops = re.findall(r"^\| \d \| `(.+?)` \| `(.+?)` \| `(.+?)` \|$", CONTRIBUTING, re.M)
    assert len(hops) == 6
    for path, name, onward in hops:
        assert onward in source_of(path, name), f"{path}: {name} does not go on with {onward}"
    for (path, _, onward), (_, following, _) in zip(hops, hops[1:], strict=False):
        words = [{w.lower() for w in name.split(".")} for name in (onward, following)]
        assert words[0] & words[1], f"{path}: {onward} is not {following}"


KINDS = get_args(get_args(ScheduleSection.model_fields["kind"].annotation)[0])  # beside functions of the user's own
LISTS = re.findall(r"^## (Adding .+?)\n(.+?)(?=^## |\Z)", CONTRIBUTING, re.M | re.S)


@pytest.mark.parametrize("text", [text for _, text in LISTS], ids=[title for title, _ in LISTS])
def test_files_to_touch_are_there_and_have_the_names(text):
    """In each item names stand after the file that has them. NAME is the reader's: its folder must be there."""
    items = re.findall(r"^- (.+(?:\n  .+)*)", text, re.M)
    assert len(items) >= 2
    for item in items:
        path = None
        for word in re.findall(r"`(.+?)`", item.replace("\n ", "")):
            if "/" in word or word.endswith((".toml", ".yml")):
                path = ROOT / word
                assert (path.parent if "NAME" in path.name else path).exists(), word
            elif path and path.is_file():
                assert word in path.read_text(), f"{path}: no {word}"


def test_there_is_a_list_for_each_thing_that_may_be_added():
    wanted = {"an engine", "a schedule", "a benchmark", "a launcher", "a scheduler", "a site", "a recipe"}
    assert {title.removeprefix("Adding ") for title, _ in LISTS} == wanted


def test_one_version_everywhere():
    version = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.M).group(1)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (hpc_lbsgd.__version__, citation["version"]) == (version, version)
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")


# ---------------------------------------------------------------- make


def make(*words: str, tree: Path = ROOT) -> subprocess.CompletedProcess:
    """As a person types it there: under `make test PART=unit` tests inherit that PART."""
    own = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PART", "VENV")}
    return subprocess.run(["make", *words], cwd=tree, env=own, capture_output=True, text=True)


def test_each_target_has_a_line_in_the_help():
    said = make("help").stdout
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert re.findall(r"^make ([\w-]+) +\S", said, re.M) == targets


def test_make_test_runs_every_folder_of_tests():
    """`make test` names folders, and a new one must be among them."""
    folders = {p.name for p in (ROOT / "tests").iterdir() if list(p.glob("test_*.py"))}
    assert {Path(p).name for p in PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"]} == folders
    assert set(re.findall(r"tests/(\w+)", make("-n", "test").stdout)) == folders
    for folder in folders:
        assert set(re.findall(r"tests/(\w+)", make("-n", "test", f"PART={folder}").stdout)) == {folder}
    refused = make("test", "PART=unti")
    assert refused.returncode == 2 and "PART=unti" in refused.stderr


def test_clean_takes_nothing_but_an_environment(tmp_path):
    """`rm -rf $(VENV)` of "/home/me/my envs/lb" would take /home/me/my."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("my", "my envs", "env", "site"):
        (tmp_path / name).mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    for venv, said in (
        ("my envs", "space"),
        (f"{tmp_path}/my envs", "space"),
        ("my", "no environment"),
        (".", "no env"),
    ):
        refused = make("clean", f"VENV={venv}", tree=tmp_path)
        assert refused.returncode == 2 and said in refused.stderr, venv
    assert {p.name for p in tmp_path.iterdir()} == {"Makefile", "my", "my envs", "env", "site"}
    for venv in ("env", ".venv"):  # .venv: it is not there, and there is nothing to do
        assert make("clean", f"VENV={venv}", tree=tmp_path).returncode == 0
    assert {p.name for p in tmp_path.iterdir()} == {"Makefile", "my", "my envs"}


# ---------------------------------------------------------------- packages


LAYERS = [re.split(r" \| ", layer) for layer in PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}  # 0: the top


HEADS = sorted(str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "hpc_lbsgd").glob("**/*/__init__.py"))


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Who imports what, inside functions too, and of other packages."""
    return grimp.build_graph("hpc_lbsgd", include_external_packages=True)


def called(module: str, package: str) -> str:
    """What the head of `package` calls a module of hpc_lbsgd: as its neighbour, else by the part of the tree."""
    for root in (package.rpartition(".")[0], "hpc_lbsgd.bench", "hpc_lbsgd"):
        if module.startswith(f"{root}.") and package.startswith(f"{root}."):
            return module.removeprefix(f"{root}.").split(".")[0]
    raise AssertionError(module)


@pytest.mark.parametrize("package", HEADS)
def test_the_head_of_a_package_says_who_imports_whom(package, graph):
    """It names all that do now, and nobody whom the contracts forbid."""
    head = ast.get_docstring(ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text()))
    said = re.findall(r"May (?:be imported by|import): ([^.]+)\.", head)
    above, below = ({name for name in re.split(r",\s+", names) if name != "nothing"} for names in said)
    inside = {package, *graph.find_descendants(package)}
    imported = {name for module in inside for name in graph.find_modules_directly_imported_by(module)} - inside
    importers = {name for module in inside for name in graph.find_modules_that_directly_import(module)} - inside
    assert {called(name, package) for name in imported if name.startswith("hpc_lbsgd.")} <= below
    assert {called(name, package) for name in importers} <= above
    level = LEVEL[package.split(".")[1]]
    assert all(LEVEL.get(name, level) <= level for name in above) and all(LEVEL.get(n, level) >= level for n in below)
    if package.count(".") == 1:
        assert above <= {n for n in LEVEL if LEVEL[n] < level} and below <= {n for n in LEVEL if LEVEL[n] > level}


def test_the_papers_mathematics_imports_numpy_and_the_standard_library_alone(graph):
    inside = {"hpc_lbsgd.theory", *graph.find_descendants("hpc_lbsgd.theory")}
    imported = {name for module in inside for name in graph.find_modules_directly_imported_by(module)} - inside
    assert imported - sys.stdlib_module_names == {"numpy"}


def test_no_import_hides_from_the_contracts():
    """import-linter sees neither names in strings nor folders without an `__init__.py`."""
    may = {"__init__.py", "imports.py"}  # the library at its first use; the user's own functions
    hidden = re.compile(r"\b(import_module|__import__)\b")
    root = ROOT / "hpc_lbsgd"
    assert {str(p.relative_to(root)) for p in root.rglob("*.py") if hidden.search(p.read_text())} == may
    assert [p for p in root.rglob("*.py") if not (p.parent / "__init__.py").exists()] == []


def test_names_of_modules_in_strings_are_modules():
    """What is started by `python -m`: a benchmark whose measure.py has moved would say so on a cluster first."""
    name = re.compile(r"hpc_lbsgd(\.[a-z_]+)+")
    found = set()
    for path in (ROOT / "hpc_lbsgd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and name.fullmatch(node.value):
                found.add(node.value)
    missing = {n for n in found if not find_spec(n)} - {"hpc_lbsgd.parallel._cpu_kernels"}  # where C is compiled
    assert "hpc_lbsgd.bench.step.measure" in found and missing == set()


def test_each_benchmark_is_a_command():
    packages = {p.parent.name for p in (ROOT / "hpc_lbsgd" / "bench").glob("*/command.py")}
    (benches,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    (names,) = (a for a in benches.choices["bench"]._actions if isinstance(a, argparse._SubParsersAction))
    assert set(names.choices) == packages


def test_the_contract_inside_benchmarks_has_all_of_them():
    """Lists that import-linter does not complete by itself, nor the page of the package."""
    packages = {p.parent.name for p in (ROOT / "hpc_lbsgd" / "bench").glob("*/__init__.py")} - {"core"}
    contract = next(c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["name"].startswith("Inside a bench"))
    assert {name.removeprefix("hpc_lbsgd.bench.") for name in contract["containers"]} == packages
    head = (ROOT / "hpc_lbsgd" / "bench" / "__init__.py").read_text()
    assert set(re.search(r"A package a benchmark: ([^.]+)\.", head).group(1).split(", ")) == packages
    manual = (ROOT / "docs" / "benchmarks.md").read_text()
    assert set(re.findall(r"^## bench (\w+)$", manual, re.M)) == packages


# ---------------------------------------------------------------- words


def says(path: Path, subject: str, words: set[str]) -> bool:
    """Has the file a statement with one of `words` and, in a name or a key, the subject they are words of?"""
    for statement in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.stmt)):
        own, names, constants = [statement], set(), set()
        while own:
            node = own.pop()
            own += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.add(node.value)
            names |= {str(getattr(node, key)) for key in ("id", "attr", "arg") if getattr(node, key, None)}
        if constants & words and any(re.search(subject, name) for name in names | (constants - words)):
            return True
    return False


@pytest.mark.parametrize(
    "title, subject, words",
    [
        ("an engine", r"^(engine|ENGINES|WAYS)$", set(get_args(Machine.model_fields["engine"].annotation))),
        (
            "a schedule",
            r"^(kind|shape|GROWING)$",
            set(KINDS) - {"constant"},
        ),
        ("a launcher", r"^(mpi|flavour|name)$", set(FLAVOURS)),
        ("a scheduler", r"^(scheduler|SCHEDULERS|system|name|launcher)$", set(SCHEDULERS)),
    ],
)
def test_whoever_knows_a_word_by_name_is_in_the_list(title, subject, words):
    """What one who adds a word has to look at: wherever another word of its kind is written."""
    text = dict(LISTS)[f"Adding {title}"]
    found = {p for p in (ROOT / "hpc_lbsgd").rglob("*.py") if says(p, subject, words)}
    names = {re.sub(r"/(?:horovod|torch|ddp)_engine", "/NAME_engine", str(p.relative_to(ROOT))) for p in found}
    names = {re.sub(rf"/schedulers/(?:{'|'.join(SCHEDULERS)})\.py", "/schedulers/NAME.py", name) for name in names}
    assert len(names) > 1 and {name for name in names if f"`{name}`" not in text} == set()


def test_each_engine_and_each_flavour_has_what_is_asked_of_it():
    engine = source_of("hpc_lbsgd/parallel/engine.py", "create")
    for word in get_args(Machine.model_fields["engine"].annotation):
        adapter = ROOT / "hpc_lbsgd" / "parallel" / f"{word}_engine.py"
        assert f'name = "{word}"' in adapter.read_text() and f'machine.engine == "{word}"' in engine
    template = (ROOT / "hpc_lbsgd" / "cluster" / "sites" / "template.yaml").read_text()
    pages = re.findall(r"\(launchers/(.+?)\.md\)", (ROOT / "docs" / "cluster.md").read_text())
    for flavour, launcher in FLAVOURS.items():
        assert Site(mpi=flavour).wire_up == launcher.srun_mpi and launcher.library and launcher.said
        assert re.search(rf"^mpi: .*\b{flavour}\b", template, re.M), "what a site may say"
        assert [page for page in pages if flavour in page], f"no page for {flavour} is linked in docs/cluster.md"


def test_each_scheduler_has_what_is_asked_of_it():
    """And its words are in its own files alone: variables and commands of Slurm are not met elsewhere."""
    template = (ROOT / "hpc_lbsgd" / "cluster" / "sites" / "template.yaml").read_text()
    manual, pages = (ROOT / "docs" / "cluster.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    asked = {name for path in (ROOT / "hpc_lbsgd" / "cluster" / "templates").glob("*.sh")
             for name in re.findall(r"^#@ (\w+)$", path.read_text(), re.M)}  # fmt: skip
    for name, system in SCHEDULERS.items():
        assert {block for block in asked if not isinstance(system.block(block), str)} == set()
        assert Site(scheduler=name, gpus_per_node=0, ranks_per_node=1).launcher == system.launchers[0]
        assert re.search(rf"^scheduler: .*\b{name}\b", template, re.M) and name in INNERMOST_FIRST
        assert f"(schedulers/{name}.md)" in manual and f"schedulers/{name}.md" in pages
    own = re.compile(r"\b(SLURM_[A-Z]+|squeue|scontrol|scancel|sbatch|PBS_\w+|qsub|qstat|LSB_\w+|bsub|bjobs)\b")
    may = {"parallel/world.py", "parallel/meeting.py"}  # where ranks find their places
    for path in (ROOT / "hpc_lbsgd").rglob("*.py"):
        where = str(path.relative_to(ROOT / "hpc_lbsgd"))
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        code = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
        words = {word for text in code if isinstance(text, str) for word in own.findall(text)}
        assert not words or where in may or where.startswith("schedulers/"), f"{where}: {words}"


def test_each_schedule_has_what_is_asked_of_it():
    """Stages, a learning rate at every step, a word in the manual."""
    manual = (ROOT / "docs" / "methods.md").read_text()
    for word in KINDS:
        recipe = recipes.read("fashion-mnist", [f"schedule.kind={word}", "train.epochs=8", "train.noise_scale_steps=5"])
        schedule = recipe.build_schedule(5000)
        assert all(schedule.at(step).lr >= 0 for step in range(schedule.steps)), word
        assert word == "constant" or f"`{word}`" in manual or f"kind: {word}`" in manual, f"docs/methods.md: {word}"
