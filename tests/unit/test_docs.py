"""The manual says what the code does, and its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

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
