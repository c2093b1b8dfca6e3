"""The manual says what the code does, and its links lead somewhere."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from manual import PAGES, ROOT, anchors, blocks, calls, quoted

from hpc_lbsgd import cli, reading, recipe


def test_recipe_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "tools" / "recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted = module.reference()
    assert (ROOT / "docs" / "recipe.md").read_text() == wanted, "run tools/recipe_reference.py > docs/recipe.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if not target.startswith("http"):
            leads = page.parent / target if target else page
            assert leads.exists() and (not anchor or anchor in anchors(leads)), f"{page}: {target}#{anchor}"


FLAG = r"(?<![\w-])--[a-z][a-z-]*"
DOTTED = r"(?<![\w./])[a-z_]+\.[a-z_]+(?![\w(/.])"
PATH = r"(?<![\w./])(?:docs|hpc_lbsgd|modules|slurm|tests|tools)/[\w./-]*\w"
OTHERS = {"--build-arg", "--mem"}  # docker's and Slurm's, of which nothing of ours makes use
PARTS = {name: field.annotation for name, field in recipe.Recipe.model_fields.items()}
SECTIONS = {name: part for name, part in PARTS.items() if hasattr(part, "model_fields")}


def test_flags_keys_and_paths_in_text_are_there():
    """A flag is one of ours, or of a program to which something of ours says it."""
    code = [p for folder in ("hpc_lbsgd", "tools", "slurm") for p in (ROOT / folder).rglob("*") if p.is_file()]
    flags = {f for p in code if p.suffix not in (".pyc", ".so") for f in re.findall(FLAG, p.read_text())} | OTHERS
    keys = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    wrong = []
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for text in quoted(page):
            wrong += [f"{page.name}: {flag}" for flag in re.findall(FLAG, text) if flag not in flags]
            dotted = [word for word in re.findall(DOTTED, text) if word.partition(".")[0] in SECTIONS]
            wrong += [f"{page.name}: {key}" for key in dotted if key not in keys]
            wrong += [f"{page.name}: {path}" for path in re.findall(PATH, text) if not (ROOT / path).exists()]
    assert wrong == []


SHORT = {"plan": [], "submit": ["--dry-run"], "reproduce": ["--list"], "simulate": []}  # what answers without the work
ANY = {"SITE": "my-site.yaml", "S": "my-site.yaml", "EXPERIMENT": "goyal-table1"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a person may be who reads a page: the site file of the page is there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_a_page_that_plan_say_what_they_would_do(page, folder, capsys):
    """Those that want files of the reader's own are elsewhere: tests/e2e has the guides from end to end."""
    site = {"partition": "gpu", "account": "proj123", "gpus_per_node": 4, "time_limit": "01:00:00"}
    system = {"scheduler": page.stem} if page.stem in ("pbs", "lsf", "flux") else {}
    (folder / "my-site.yaml").write_text(yaml.safe_dump(site | system))
    (folder / "data/fashion-mnist/train").mkdir(parents=True)
    wrong = []
    for line in calls(page):
        recipe = "goyal-resnet50" if "--sweep" in line else "fashion-mnist"  # a batch that all sizes can share
        words = [(ANY | {"RECIPE": recipe}).get(word, word) for word in line]
        short = next((more for name, more in SHORT.items() if name in words[:2]), None)
        own = [word for word in words if word.endswith((".yaml", ".json")) and word != "my-site.yaml"]
        if short is None or own or {"RUN", "runs/mine", "--resume", "..."} & set(words):
            continue
        words = [word for word in words if word != "--test-only"]
        words += [word for word in short if word not in words]
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        if code != 0:
            wrong.append(f"{line}: {capsys.readouterr().err}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_keys_that_a_page_sets_are_keys_of_a_recipe(page):
    for words in calls(page):
        settings = [value for flag, value in zip(words, words[1:], strict=False) if flag == "--set"]
        name = next((word for word in words if word in reading.shipped()), "fashion-mnist")
        recipe.read(name, [text for text in settings if not text.endswith(("=", ".yaml", ".pth"))])


def test_the_recipe_in_the_readme_is_valid():
    from hpc_lbsgd import yaml12

    (block,) = (block for block in blocks(ROOT / "README.md") if block.language == "yaml")
    assert recipe.validate(yaml12.mapping(block.text, "README.md")).determinism == "any-ranks"


def test_every_page_is_in_the_sites_list():
    """`make docs` ends at a page that is not; this says so without building it."""

    def pages(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(value)

    listed = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_the_notebooks_cells_run_from_first_to_last():
    found = json.loads((ROOT / "docs" / "examples" / "noise_scale.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in found["cells"] if cell["cell_type"] == "code"), (
        "keep it without outputs"
    )
    code = "\n".join([*cells, "assert losses[-1] < losses[0] / 2 and len(scales) > 3, (losses, scales)"])
    env = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "noise scale" in done.stdout, done.stderr
