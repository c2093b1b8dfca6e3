"""What mpirun says instead of starting ranks comes as one line; all else comes as it is, at once. A real mpirun says
it."""

import os
import subprocess
import sys
import time

import pytest

from hpc_lbsgd.cluster import check_ranks
from hpc_lbsgd.parallel import refusals
from hpc_lbsgd.parallel.launchers import Layout, has_mpi, starter

pytestmark = pytest.mark.skipif(not has_mpi(), reason="no mpirun here")
MANY = 10_000
RULE = 74 * "-" + "\n"


def started(layout: Layout, *program) -> tuple[subprocess.Popen, str]:
    launcher, path = starter()
    process, said = refusals.start(launcher, [*launcher.line(path, layout, {}), *map(str, program)])
    code = process.wait(60)
    return code, said()


@pytest.fixture
def hostfile(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("localhost slots=3\n")
    return file


def test_too_few_slots(hostfile, capfd):
    for layout, count in ((Layout(MANY), refusals.slots(Layout(MANY))), (Layout(4, hostfile=str(hostfile)), "3 slots")):
        code, said = started(layout, "true")
        line = refusals.refusal(said, layout)
        assert code != 0 and line.startswith(f"{layout.ranks} ranks, but there are {count} (") and "\n" not in line
        assert count.split()[0].isdigit() and "--oversubscribe" in line
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "hosts, hostfile, program, words",
    [
        (None, None, "/no/such/program", ["/no/such/program cannot be started on "]),
        (None, None, "/tmp", ["/tmp cannot be started on ", ": Permission denied"]),
        (None, "localhost slots=1\n)(/&%\n", "true", ["line 2: not a line of a hostfile, such as"]),
        ("no-such-host", None, "true", ["on host no-such-host: is the name right"]),
    ],
)
def test_what_else_a_person_gets_wrong(hosts, hostfile, program, words, tmp_path, capfd):
    if hostfile:
        (tmp_path / "hosts").write_text(hostfile)
    layout = Layout(1, hosts, str(tmp_path / "hosts") if hostfile else None)
    code, said = started(layout, program)
    line = refusals.refusal(said, layout)
    assert code != 0 and all(word in line for word in words) and "\n" not in line
    out, err = capfd.readouterr()
    assert out == "" and all(text.startswith("ssh: ") for text in err.splitlines()), err  # ssh's own line says why


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_root_without_the_variables(monkeypatch, capfd):
    monkeypatch.delenv("OMPI_ALLOW_RUN_AS_ROOT")
    code, said = started(Layout(1), "true")
    assert code != 0 and "set OMPI_ALLOW_RUN_AS_ROOT=1" in refusals.refusal(said, Layout(1))
    assert capfd.readouterr() == ("", "")


def test_doctor_says_it_too():
    launcher, path = starter()
    found = check_ranks.run([*launcher.line(path, Layout(MANY), {}), "true"], Layout(MANY))
    assert found["problem"].startswith(f"{MANY} ranks, but there are ")


def test_open_mpi_4_says_it_in_other_words():
    for said, words in (
        ("mpirun was unable to launch the specified application as it could not access\nor execute an executable:\n\n"
         "Executable: /x y\nNode: b\n\nwhile attempting to start process rank 0.", "/x y cannot be started on b"),
        ("ORTE was unable to reliably start one or more daemons.\nThis usually is caused by:", "started on host HOST"),
        ("Some of the requested hosts are not included in the current allocation for the\napplication:", "this job's"),
    ):  # fmt: skip
        assert words in refusals.refusal(said, Layout(1))


RANK = f"""
import os, sys, time
os.write(1, b"a line\\n")
while not os.path.exists(sys.argv[1]): time.sleep(0.02)
os.write(2, {RULE!r}.encode() + b"a rank's own table\\n")
while not os.path.exists(sys.argv[2]): time.sleep(0.02)
os.write(2, {RULE!r}.encode() + b"the end, without its line's")
"""


def test_all_else_is_passed_on_as_it_comes(tmp_path, capfd):
    """Also what only looks like the beginning of one of mpirun's pages."""
    launcher, path = starter()
    files = [tmp_path / "first", tmp_path / "second"]
    line = [*launcher.line(path, Layout(1), {}), sys.executable, "-c", RANK, *map(str, files)]
    process, said = refusals.start(launcher, line)
    seen = ["", ""]

    def wait_for(stream, text):
        until = time.monotonic() + 20
        while text not in seen[stream]:
            assert time.monotonic() < until, seen
            seen[0], seen[1] = (a + b for a, b in zip(seen, capfd.readouterr(), strict=True))
            time.sleep(0.02)

    try:
        wait_for(0, "a line")
        files[0].touch()
        wait_for(1, "a rank's own table")
        files[1].touch()
        assert process.wait(30) == 0 and said() == ""
        wait_for(1, "the end")
    finally:
        process.kill()  # where something is missing its rank would wait for ever
    assert seen == ["a line\n", f"{RULE}a rank's own table\n{RULE}the end, without its line's"]


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_a_stream_in_pieces(size):
    page = f"{RULE}There are not enough slots available in the system to satisfy the 5\nslots that were\n{RULE}\0"
    before, after = f"bar\r10 %\n--\n{RULE}mine\n{RULE}half", f"\n{RULE}No nodes are available\n{RULE}more -\n-"
    pages, out = refusals.Pages(), b""
    data = f"{before}\n{page}{after}".encode()
    for at in range(0, len(data), size):
        out += pages.feed(data[at : at + size])
    out += pages.flush()
    assert out.decode() == before + "\n" + "\nmore -\n-" and "satisfy the 5" in pages.kept
