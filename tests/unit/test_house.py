"""The tree is as its pages say: the walk, files to touch, targets of make, heads of packages; and no file is long."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import grimp
import pytest
import yaml

import hpc_lbsgd

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


LISTS = re.findall(r"^## (Adding .+?)\n(.+?)(?=^## |\Z)", CONTRIBUTING, re.M | re.S)


@pytest.mark.parametrize("text", [text for _, text in LISTS], ids=[title for title, _ in LISTS])
def test_files_to_touch_are_there_and_have_the_names(text):
    """In each item names stand after the file that has them. NAME is the reader's: its folder must be there."""
    items = re.findall(r"^- (.+(?:\n  .+)*)", text, re.M)
    assert len(items) >= 2
    for item in items:
        path = None
        for word in re.findall(r"`(.+?)`", item.replace("\n ", "")):
            if "/" in word or word.endswith(".toml"):
                path = ROOT / word
                assert (path.parent if "NAME" in path.name else path).exists(), word
            elif path and path.is_file():
                assert word in path.read_text(), f"{path}: no {word}"


def test_there_is_a_list_for_each_thing_that_may_be_added():
    wanted = {"an engine", "a schedule", "a benchmark", "a launcher", "a site", "a recipe"}
    assert {title.removeprefix("Adding ") for title, _ in LISTS} == wanted


def test_one_version_everywhere():
    version = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.M).group(1)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (hpc_lbsgd.__version__, citation["version"]) == (version, version)
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")


# ---------------------------------------------------------------- make


def test_each_target_has_a_line_in_the_help():
    said = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()
    assert re.findall(r"^make ([\w-]+) +\S", said, re.M) == targets


def test_make_test_runs_every_folder_of_tests():
    """`make test` names folders, and a new one must be among them."""
    folders = {p.name for p in (ROOT / "tests").iterdir() if list(p.glob("test_*.py"))}
    assert {Path(p).name for p in PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"]} == folders
    lines = subprocess.run(["make", "-C", ROOT, "-n", "test"], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"tests/(\w+)", lines)) == folders


# ---------------------------------------------------------------- packages


LAYERS = [re.split(r" \| ", layer) for layer in PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}  # 0: the top
PACKAGES = sorted(p.parent.name for p in (ROOT / "hpc_lbsgd").glob("*/__init__.py"))


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What is imported by each part of hpc_lbsgd, inside functions too."""
    graph, found = grimp.build_graph("hpc_lbsgd"), defaultdict(set)
    for module in graph.modules - {"hpc_lbsgd"}:
        part = module.split(".")[1]
        below = {name.split(".")[1] for name in graph.find_modules_directly_imported_by(module) if "." in name}
        found[part] |= below - {part}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_head_of_a_package_says_who_imports_whom(package, imports):
    """It names all that do now, and nobody whom the contracts forbid."""
    head = ast.get_docstring(ast.parse((ROOT / "hpc_lbsgd" / package / "__init__.py").read_text()))
    said = re.findall(r"May (?:be imported by|import): ([^.]+)\.", head)
    above, below = ({name for name in re.split(r",\s+", names) if name != "nothing"} for names in said)
    assert imports[package] <= below <= {name for name in LEVEL if LEVEL[name] > LEVEL[package]}
    now = {part for part, names in imports.items() if package in names}
    assert now <= above <= {name for name in LEVEL if LEVEL[name] < LEVEL[package]}
