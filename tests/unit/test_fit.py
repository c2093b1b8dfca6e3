"""Tables of benchmarks fit the terminal they are shown on, and lose nothing by it."""

import re
import sys

import pytest
from test_progress import on_terminal

from hpc_lbsgd.bench.checkpoint import show as checkpoint
from hpc_lbsgd.bench.core.fit import fit
from hpc_lbsgd.bench.loader import show as loader
from hpc_lbsgd.bench.simulate import run as simulate
from hpc_lbsgd.bench.simulate import show as simulated

SPREAD = {f"{what}_s{end}": 1.234 for what in ("stall", "write") for end in ("", "_low", "_high")}
RATE = {"loader": "hpc_lbsgd, torchvision, raw pixels", "threads": 2, "images_per_s": 12345.6, "lowest": 1.0,
        "highest": 23456.7, "first_over_this": 1.0}  # fmt: skip
TEXTS = {
    "Markdown": loader.show({"rounds": 5, "rows": [RATE, RATE | {"loader": "a", "threads": 16}]}),
    "wide Markdown": checkpoint.show(
        {"rounds": 7, "rows": [{"recipe": "goyal-resnet50", "way": "behind", "bytes": 2e8, **SPREAD}]}
    ),
    "aligned": simulated.show_published(simulate.against_published()),
    "aligned, with sentences": simulated.show(
        simulate.predict("a100-hdr", simulate.choose("a100-hdr"), simulate.NODES)
    ),
}


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\s|]+", text)) - {"---", "---:"}


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_nothing_is_wider_and_nothing_is_lost(text, width):
    shown = fit(text, width)
    assert max(map(len, shown.splitlines())) <= width
    assert words(shown) == words(text)
    if all(len(line) <= width for line in text.splitlines()):
        assert shown == text


def test_each_block_has_the_first_column_and_a_rows_own_numbers():
    text = "| way | a long head | b long head | c |\n|---|---:|---:|---|\n| ours | 1 | 2 | x y |\n| theirs | 30 | 4 | |"
    assert fit(text, 30).splitlines() == [
        "way     a long head", "ours              1", "theirs           30", "",
        "way     b long head  c", "ours              2  x y", "theirs            4",
    ]  # fmt: skip


def test_a_command_on_a_narrow_terminal():
    line = [sys.executable, "-m", "hpc_lbsgd.cli", "bench", "simulate", "--published"]
    assert max(map(len, on_terminal(line, 60).split("\r\n"))) <= 60
