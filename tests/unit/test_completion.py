"""TAB in a real bash; the scripts of the other shells."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest
from conftest import command

from hpc_lbsgd import cli, completion

pytest.importorskip("argcomplete", reason="argcomplete is not installed")


class Bash:
    """A shell at a terminal, in which the completion was read."""

    def __init__(self, folder):
        program = folder / "hpc-lbsgd"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hpc_lbsgd.cli "$@"\n')
        program.chmod(0o755)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe("bash", ["bash", "--norc", "--noprofile"], {**os.environ, "PS1": "ready> ", "TERM": "dumb"})
        self.type('eval "$(hpc-lbsgd completion bash)"; echo do""ne\n', "done")

    def type(self, text: str, expected: str) -> str:
        """What is shown until `expected` is, after typing `text`."""
        os.write(self.master, text.encode())
        shown, until = "", time.monotonic() + 30
        while expected not in shown.removeprefix(text):
            assert time.monotonic() < until, shown
            if select.select([self.master], [], [], 0.1)[0]:
                shown += os.read(self.master, 65536).decode(errors="replace").replace("\r", "")
        os.write(self.master, b"\x15")  # forget the line
        return shown

    def close(self):
        os.close(self.master)
        os.waitpid(self.pid, 0)


@pytest.fixture
def bash(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])
    shell = Bash(tmp_path)
    yield shell
    shell.close()


def test_bash_completes_commands_flags_recipes_keys_and_files(bash, tmp_path):
    (tmp_path / "pictures.yaml").touch()
    for typed, becomes in (
        ("hpc-lbsgd eval\t", "hpc-lbsgd evaluate "),
        ("hpc-lbsgd bench all\t", "hpc-lbsgd bench allreduce "),
        ("hpc-lbsgd train fash\t", "hpc-lbsgd train fashion-mnist "),
        ("hpc-lbsgd train pic\t", "hpc-lbsgd train pictures.yaml "),
        ("hpc-lbsgd train x --resume-i\t", "hpc-lbsgd train x --resume-if-exists "),
        ("hpc-lbsgd train x --set optim.base_l\t", "hpc-lbsgd train x --set optim.base_lr="),
        ("hpc-lbsgd reproduce goyal-table2a --sca\t", "hpc-lbsgd reproduce goyal-table2a --scale "),
    ):
        bash.type(typed, becomes)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_gets_a_script(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "hpc-lbsgd" in text and "_ARGCOMPLETE" in text
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_another_shell_is_refused():
    result = command("completion", "tcsh")
    assert result.returncode == 2 and "'tcsh'" in result.stderr and "Traceback" not in result.stderr
