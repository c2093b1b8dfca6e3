"""The manual says what the code does, and its links lead somewhere."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpc_lbsgd import cli

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_recipe_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "tools" / "recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wanted = module.reference()
    assert (ROOT / "docs" / "recipe.md").read_text() == wanted, "run tools/recipe_reference.py > docs/recipe.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page}: {target}"


def commands_of(page: Path) -> list[str]:
    """Lines of the page's blocks that call us, as a shell would have them: joined, without remarks."""
    found = re.findall(r"^ *(?:mpirun [^\n#]+? )?(hpc-lbsgd (?:[^\n]*\\\n)*[^\n]*)", page.read_text(), re.M)
    lines = [re.sub(r"\\\n", " ", line) for line in found]
    lines = [re.sub(r" {2,}\S.*" if page.name == "README.md" else r"\s#.*", "", line) for line in lines]
    lines = [
        re.sub(r"\[[^\]]*\]|>.*", "", line.replace("step-[12]-*", "a").replace("step-[48]-*", "b")) for line in lines
    ]
    return [part if i == 0 else f"hpc-lbsgd {part}" for line in lines for i, part in enumerate(line.split(" · "))]


def test_every_command_in_the_manual_is_one_that_there_is(capsys):
    wrong, count = [], 0
    for page in PAGES:
        for line in commands_of(page):
            words = shlex.split(line.replace("$r", "1"))[1:]
            try:
                args = cli.parser().parse_args(words)
                if words[0] == "launch":
                    cli.parser().parse_args([word for word in args.job if word != "--"])
            except SystemExit:
                wrong.append(f"{page.relative_to(ROOT)}: {line}: {capsys.readouterr().err.splitlines()[-1]}")
            count += 1
    assert count > 120 and wrong == []


def test_the_recipe_in_the_readme_is_valid():
    from hpc_lbsgd import recipe, yaml12

    block = re.search(r"## A recipe\n\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text()).group(1)
    assert recipe.validate(yaml12.mapping(block, "README.md")).determinism == "any-ranks"


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
