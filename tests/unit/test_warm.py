"""What a warm process does is what a cold one does (tests/warm.py)."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import conftest
import pytest
import warm

SHOW = """
import json, os, sys, beside
found = {"name": __name__, "words": sys.argv, "here": os.getcwd(), "mark": os.environ.get("MARK"), "hash": hash("a"),
         "ours": [m for m in sys.modules if m.startswith(("hpc_lbsgd", "conftest"))], "read": sys.stdin.read()}
print(json.dumps(found))
sys.exit(7)
"""
WAITS = """
import os, sys, time
print(os.getpid(), flush=True)
time.sleep(100)
"""


def test_it_has_its_own_words_place_environment_modules_streams_and_code(tmp_path, monkeypatch):
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "beside.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "path")
    monkeypatch.setenv("MARK", "\udcff here")
    found = []
    for rank, words in enumerate((["show.py", "-x", "ä"], ["-m", "show", "-x", "ä"])):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
        job = subprocess.run([*warm.python(2), *words], input="read", capture_output=True, text=True, timeout=120)
        assert job.returncode == 7 and job.stderr == "", job.stderr
        found.append(json.loads(job.stdout))
    for one, first in zip(found, ("show.py", str(tmp_path / "show.py")), strict=True):
        assert one["words"] == [first, "-x", "ä"] and one["name"] == "__main__" and one["ours"] == []
        assert one["here"] == str(tmp_path) and one["mark"] == "\udcff here" and one["read"] == "read"
    assert found[0]["hash"] != found[1]["hash"]  # sets have another order on each rank


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_what_started_it_and_the_other_way_round(tmp_path, number):
    (tmp_path / "waits.py").write_text(WAITS)
    for hurt in ("starter", "job"):
        line = [*warm.python(), tmp_path / "waits.py"]
        starter = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        job = int(starter.stdout.readline())
        os.kill(starter.pid if hurt == "starter" else job, number)
        assert starter.wait(60) == -number
        end = time.monotonic() + 60
        while Path(f"/proc/{job}").exists() and time.monotonic() < end:
            time.sleep(0.01)
        assert not Path(f"/proc/{job}").exists()
        starter.stdout.close()


def test_an_error_is_told_as_python_tells_it(tmp_path):
    (tmp_path / "wrong.py").write_text("import nowhere")
    job = conftest.alone(tmp_path / "wrong.py")
    assert job.returncode == 1 and job.stderr.endswith("ModuleNotFoundError: No module named 'nowhere'\n")
