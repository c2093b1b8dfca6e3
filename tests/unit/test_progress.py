"""-q and -v, before a command and behind it; NO_COLOR; bars that fit."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import command
from test_display import schedule, step

from hpc_lbsgd import cli, progress
from hpc_lbsgd.train.display import Display


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv(progress.SAY, "")


@pytest.mark.parametrize("words", [["-q", "recipes"], ["recipes", "--quiet"], ["bench", "-q", "simulate", "--list"]])
def test_quiet(words, capsys):
    assert cli.main(words) == 0
    progress.note("a line of progress")
    out, err = capsys.readouterr()
    assert out and err == ""
    assert progress.bar(total=3).disable


def test_a_quiet_run_says_what_happened_to_it(monkeypatch):
    monkeypatch.setenv(progress.SAY, progress.QUIET)
    out = io.StringIO()
    display = Display(schedule(), 0, 1, out)
    display(step(0))
    display({"kind": "eval", "step": 1, "epoch": 1, "loss": 1.0, "accuracy": 0.5, "samples": 8})
    display({"kind": "event", "event": "slow", "rank": 3})
    assert out.getvalue() == "slow: rank 3\n"


def test_verbose_says_what_is_run_and_where_an_error_was_raised(tmp_path):
    words = ["launch", "--np", "500", "--", "preflight", "bench-resnet20"]
    plain, more = command(*words), command("-v", *words)
    assert plain.returncode == more.returncode == 2
    assert more.stderr.startswith("+ ") and "-np 500" in more.stderr and "RequestError" in more.stderr
    assert len(plain.stderr.splitlines()) == 1 and more.stderr.splitlines()[-1] == plain.stderr.strip()
    result = command("recipes", "-q", "-v")
    assert result.returncode == 2 and "not allowed with argument" in result.stderr


BAR = """
from hpc_lbsgd import progress
with progress.bar(total=10, desc="packing a/folder/of/mine", unit="image") as bar:
    for _ in range(10):
        bar.update(1)
        bar.refresh()
"""


def on_terminal(line: list, columns: int = 80, **environment) -> str:
    """What a program shows on a real terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(list(map(str, line)), stdout=slave, stderr=slave, env=kept | environment)
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 65536):
            shown += data
    except OSError:  # it has ended
        pass
    os.close(master)
    assert process.wait(60) == 0, shown
    return shown.decode()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_bar_fits_its_terminal(columns):
    drawn = [part for part in re.split(r"[\r\n]", on_terminal([sys.executable, "-c", BAR], columns)) if part.strip()]
    assert len(drawn) > 2 and max(map(len, drawn)) <= columns and not [part for part in drawn if "\x1b[3" in part]


@pytest.mark.parametrize("words", [["watch"], ["--help"]])
def test_no_colour_where_none_is_wanted(words, tmp_path):
    """`watch` has a screen of rich's, `--help` is argparse's."""
    (tmp_path / "recipe.yaml").write_text("seed: 1\n")
    (tmp_path / "status.json").write_text('{"status": "done", "step": 1}')
    line = [sys.executable, "-m", "hpc_lbsgd.cli", *words, *([tmp_path] if words == ["watch"] else [])]
    shown = on_terminal(line, NO_COLOR="1", TERM="xterm-256color")
    assert shown and not re.search(r"\x1b\[[1-9][0-9;]*m", shown), shown
