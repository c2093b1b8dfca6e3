"""What a person may name by mistake: each command says so in a line, without a traceback."""

import io
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

from hpc_lbsgd import cli
from hpc_lbsgd.errors import EXIT_FAILED, EXIT_REQUEST

COMMANDS = """
plan B
plan goyal-resnet50 --noise-from B
train B --run r
train fashion-mnist --set machine=B --run r
preflight B
launch --np 1 -- train B --run r
submit B --dry-run
submit fashion-mnist --site B --dry-run
resume B --dry-run
evaluate B B
predict B B
export B --out x.pt
watch B --once
report B
compare B B
audit B
launch --np 1 -- audit B
data order B --worker 0
data index B
data verify B
data pack B packed
data show B --html x.html
init B
bench rates B
bench scaling B --ranks 1
bench scaling --report B
bench loader B
bench simulate --from B
bench simulate --calibrate B --against B
"""
BAD = ("image.png", "unreadable", "folder", "empty", "binary", "two\nlines", "nowhere", "x" * 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    Image.new("RGB", (9, 9)).save(root / "image.png")
    (root / "folder").mkdir()
    (root / "empty").touch()
    (root / "unreadable").symlink_to("unreadable")  # by root too
    (root / "binary").write_bytes(bytes(range(256)) * 20)
    (root / "two\nlines").write_text("seed: -1\n")
    return root


@pytest.mark.parametrize("bad", BAD, ids=[repr(name)[1:13] for name in BAD])
def test_no_traceback(bad, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    wrong = {}
    for line in COMMANDS.strip().splitlines():
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
        words = [bad if word == "B" else word for word in line.split(" ")]
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
        except Exception as problem:
            code = repr(problem)
        said = capfd.readouterr().err
        # a page about what is not there is no fault; what does work out must not be one either
        told = said.count("hpc-lbsgd: ") == 1 and len(said) < 2000 and "Traceback" not in said
        if code not in (EXIT_REQUEST, EXIT_FAILED) or not told:
            wrong[line] = (code, said[-300:])
    assert wrong == {} and not os.path.exists("r")


@pytest.mark.parametrize(
    "words", [["recipes"], ["recipes", "--schema"], ["bench", "simulate", "--json"], ["plan", "goyal-resnet50"]]
)
def test_a_full_disk_behind_stdout(words):
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "hpc_lbsgd", *words]
        result = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "hpc-lbsgd: stdout cannot be written: no space left on device\n")


LOADING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
wanted = sys.argv[1]
class Impatient:
    def find_spec(self, name, path, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Impatient())
sys.argv = ["hpc-lbsgd", *sys.argv[2:]]
from hpc_lbsgd import __main__
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("module", ["hpc_lbsgd.cli", "hpc_lbsgd.bench.commands", "hpc_lbsgd.plan", "numpy"])
def test_ctrl_c_while_it_loads(module):
    line = [sys.executable, "-c", LOADING, module, "plan", "goyal-resnet50"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=60)
    ended = (-signal.SIGINT, "") if "cli" in module or "commands" in module else (130, "hpc-lbsgd: ended by Ctrl-C\n")
    assert (result.returncode, result.stderr) == ended and result.stdout == ""


@pytest.mark.parametrize(
    "words, near",
    [("pln x", "plan"), ("plan x --nods 3", "--nodes"), ("bench loader x --theads=2", "--threads"),
     ("plan fashon-mnist", "fashion-mnist")],
)  # fmt: skip
def test_what_is_nearly_right_is_asked_about(words, near, capsys):
    try:
        code = cli.main(words.split())
    except SystemExit as end:
        code = end.code
    assert code == EXIT_REQUEST and capsys.readouterr().err.endswith(f"; did you mean {near}?\n")
