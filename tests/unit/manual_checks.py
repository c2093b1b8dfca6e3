"""What will read a command of the manual, asked whether it takes its words: a check a program. Nothing is started but
job scripts, among programs in Slurm's place, and what writes modulefiles."""

import argparse
import configparser
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

from manual import ROOT, asked

from hpc_lbsgd import cli
from hpc_lbsgd.cluster.script import Job, render
from hpc_lbsgd.cluster.sites import Site
from hpc_lbsgd.records import RunFolder
from hpc_lbsgd.schedulers.known import SCHEDULERS

MAKEFILE = (ROOT / "Makefile").read_text()
OURS = configparser.ConfigParser()
OURS.read(ROOT / "setup.cfg")
SLURM = "".join(p.read_text() for p in [*(ROOT / "slurm").iterdir(), ROOT / "hpc_lbsgd/schedulers/slurm.py"])
OF_THE_SITE = {"gcc", "openmpi", "cuda"}  # modules of other people
OF_OTHERS = {"scipy", "s3fs", "pip-audit"}  # packages that we neither need nor have
ANY = {"COMMAND": "plan", "EXPERIMENT": "goyal-table1"}  # names for which only some words stand
READERS_OWN = {"script.py", "SITE.py"}


class Parsed(Exception):
    """A program has taken its words; what it would do now is not wanted."""


def taken(self, words=None, namespace=None):
    found, rest = self.parse_known_args(words, namespace)
    if rest:
        self.error(f"unrecognized arguments: {' '.join(rest)}")
    raise Parsed


class Checks:
    """A method a program, with - as _; it gets the words behind the name."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.done: set[tuple[str, ...]] = set()
        self.ours = cli.parser()

    def check(self, words: list[str]) -> None:
        name = Path(words[0]).name.replace("-", "_")
        known = name in vars(Checks) and name not in ("check", "file")
        assert known, f"no check for {words[0]}: write one in tests/unit/test_manual.py"
        if tuple(words) not in self.done:
            getattr(self, name)(words[1:])
            self.done.add(tuple(words))

    # ---------------------------------------------------------------- programs of ours

    def hpc_lbsgd(self, words):
        words = [ANY.get(word, word) for word in words]
        try:
            args = self.ours.parse_args(words)
        except SystemExit as end:
            if end.code == 0:  # --help, --version
                return
            raise
        if args.command == "launch":
            self.ours.parse_args([word for word in args.job if word != "--"])

    def python(self, words):
        if words[0] == "-m":
            assert find_spec(words[1]), f"no module {words[1]}"
            if words[1].startswith("hpc_lbsgd") and words[2:]:
                self.hpc_lbsgd(words[2:])
        elif words[0] not in READERS_OWN:
            self.file(*words)

    python3 = python

    def file(self, name, *words):
        """The program's own parser, up to where it has taken its words."""
        path = next((folder / name for folder in (ROOT, ROOT / "docs/examples") if (folder / name).exists()), None)
        assert path, f"no {name}"
        source = path / "__main__.py" if path.is_dir() else path
        if "argparse" not in source.read_text():
            assert not words, f"{name} has no parser for its words"
            return
        with self.monkeypatch.context() as patch, contextlib.suppress(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", taken)
            patch.setattr(sys, "argv", [str(path), *words])
            patch.setattr(sys, "path", [str(path.parent), *sys.path])
            patch.setattr(os, "environ", dict(os.environ))
            runpy.run_path(str(path), run_name="__main__")
            raise AssertionError(f"{name} did not ask its parser")

    def make(self, words):
        """Each variable must do something for this target; and what make would start is checked as well."""
        targets = [word for word in words if "=" not in word]
        assert len(targets) == 1 and set(targets) <= set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split())
        said = dry(*words)
        for word in words:
            without = [other for other in words if other != word]
            assert word in targets or said != dry(*without), f"make {targets[0]} does not read {word}"
            if targets == ["faults"] and word.startswith("PART=") and word != "PART=page":
                rows = "".join(path.read_text() for path in (ROOT / "tests/faults/matrix").glob("*.py"))
                begun = rf'[Rr]ow\(\s*f?"{word.removeprefix("PART=")}'
                assert re.search(begun, rows), f"no row of the matrix begins so: {word}"
        starts = re.findall(r"^no-venv/bin/((?:hpc-lbsgd|python (?:tools|tests)/).*)$", said, re.M)
        for line in starts:
            self.check(shlex.split(line))

    def module(self, words):
        verb, *names = words
        there = {"use": set(self.modulefiles), "load": OF_THE_SITE.union(*self.modulefiles.values())}[verb]
        for name in names:
            assert (Path(name).name if verb == "use" else name.split("/")[0]) in there, name

    @cached_property
    def modulefiles(self) -> dict[str, set[str]]:
        """Names of modules in each folder that `make module` writes."""
        program = self.folder / "environment" / "bin" / "hpc-lbsgd"
        program.parent.mkdir(parents=True)
        program.touch()
        words = [ROOT / "tools/make_module.py", self.folder / "files", "--environment", program.parents[1]]
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, timeout=60)
        return {kind.name: {p.name for p in kind.iterdir()} for kind in (self.folder / "files").iterdir()}

    # ---------------------------------------------------------------- what starts ours

    def sbatch(self, words):
        """The script itself, with programs in Slurm's place: it must hand on words that we take."""
        options, (script, *rest) = split(words)
        slurms(options)
        assert Path(script) in {p.relative_to(ROOT) for p in (ROOT / "slurm").iterdir()}, script
        started = job(self.folder, script, rest)
        assert started, f"{script} starts nothing"
        for words in started:
            self.hpc_lbsgd(words)

    def srun(self, words):
        options, rest = split(words)
        slurms(options)
        if rest:
            self.check(rest)

    salloc = srun

    def sh(self, words):
        assert words[0] == "-c" and len(words) == 2
        for _, inner in asked([words[1]], SLURM_PROCID="1", SLURM_NTASKS="4"):
            self.check(inner)

    def mpirun(self, words):
        while words[0] in ("-np", "-n", "-N", "-e"):
            words = words[2:]
        if words != ["--version"]:
            self.check(words)

    aprun = mpirun

    def torchrun(self, words):
        from torch.distributed.run import get_args_parser  # noqa: TID251  (its words, not its sums)

        args = get_args_parser().parse_args(words)
        rest = [args.training_script, *args.training_script_args]
        self.python(["-m", *rest] if args.module else rest)

    def docker(self, words):
        if words[0] == "build":
            assert words[1] == "-f" and (ROOT / words[2]).is_file() and (ROOT / words[-1]).is_dir()
        else:
            lines = (ROOT / "tools/containers/Dockerfile").read_text().splitlines()
            said = {line.split()[0]: line.partition(" ")[2] for line in lines if line}
            inside = words[words.index("hpc_lbsgd") + 1 :] or json.loads(said["CMD"])
            self.check([*json.loads(said["ENTRYPOINT"]), *inside])

    def apptainer(self, words):
        if words[0] == "build":
            assert (ROOT / words[2]).is_file()
        else:
            run = re.search(r'%runscript\n +exec (\S+) "\$@"\n', (ROOT / "tools/containers/hpc_lbsgd.def").read_text())
            self.check([run[1], *words[words.index("hpc_lbsgd.sif") + 1 :]])

    def reframe(self, words):
        options = dict(zip(words, words[1:], strict=False))
        source = (ROOT / options["-c"]).read_text()
        assert "-n" not in options or f"class {options['-n']}(" in source
        assert "-S" not in options or f"    {options['-S'].split('=')[0]} = variable(" in source

    # ---------------------------------------------------------------- programs of others

    def pip(self, words):
        constraints, names = by_pip(*words)
        for path in constraints:
            assert (ROOT / path).is_file(), path
        needed = OURS["options"]["install_requires"] + "".join(OURS["options.extras_require"].values())
        for name in names:
            package, extra, version = re.fullmatch(r"([\w.-]+)(?:\[(\w+)\])?(?:==(.+))?", name).groups()
            if package == OURS["metadata"]["name"]:
                assert not extra or extra in OURS["options.extras_require"], f"no extra {extra}"
            elif package not in OF_OTHERS | {"..."}:
                pinned = f"=={version}$" if version else ""
                assert re.search(rf"^{package}\b{pinned}", needed, re.M), f"{name} is not ours"

    def touch(self, words):
        assert [Path(word).name for word in words] == [RunFolder("RUN").stop_file.name]

    def scancel(self, words):
        assert words == ["--signal=USR2", "JOB"] and hears("slurm", "USR2")

    def bkill(self, words):
        assert words == ["-s", "USR2", "JOB"] and hears("lsf", "USR2")

    def qsig(self, words):
        assert words == ["-s", "USR2", "JOB"] and hears("pbs", "USR2")

    def source(self, words):
        """fish's, of what it gets by its pipe."""
        assert not words

    def sacctmgr(self, words):
        """An administrator's; nothing of it is ours."""

    pip_audit = sacctmgr


def by_pip(*words: str) -> tuple[list[str], list[str]]:
    """(files of constraints, packages), by a process of its own: pip loads Python's own distutils, beside which
    setuptools, and so torch's compiler, cannot be loaded."""
    code = "import json, sys; from pip._internal.commands import create_command as c; "
    code += "options, names = c(sys.argv[1]).parse_args(sys.argv[2:]); print(json.dumps([options.constraints, names]))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cache
def dry(*words: str) -> str:
    """What make would do where nothing is installed yet."""
    line, env = ["make", "-n", "VENV=no-venv", "NP=2", *words], {"PATH": os.environ["PATH"]}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return re.sub(r"\$\(\(\$\(date \+%s\) - \d+\)\)", "", done.stdout)  # seconds


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """(options of the form --name=value, the rest)."""
    first = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    return words[:first], words[first:]


def slurms(options: list[str]) -> None:
    """What the manual says to Slurm, our scripts say as well, and those are tried on a real one."""
    for option in options:
        name = option.removeprefix("--").split("=")[0]
        assert re.search(rf'--{name}\b(?!-)|^ +"{name}": ', SLURM, re.M) and "=" in option, f"{option}: not in slurm/"


IN_SLURM_S_PLACE = r"""#!/bin/sh
for word; do printf '%s\037' "$word" >>asked; done; printf '\036' >>asked
case "$*" in
    *" hostnames "*) echo n1 ;;
    *" own "*) echo me ;;
    *" train "*) for run in runs/*; do printf '{\n "status": "done"\n}\n' >"$run/status.json"; done ;;
esac
"""


def job(folder: Path, script: str, words: list[str]) -> list[list[str]]:
    """What words of ours a job of `sbatch SCRIPT WORDS` starts."""
    for name in ("srun", "scontrol", "squeue", "python"):
        (folder / name).write_text(IN_SLURM_S_PLACE)
        (folder / name).chmod(0o755)
    (folder / "asked").write_text("")
    env = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(
        ["bash", ROOT / script, *words], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**env, "SLURMD_NODENAME": "n1", "PATH": f"{folder}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    starts = [line.split("\x1f")[:-1] for line in (folder / "asked").read_text().split("\x1e")]
    return [line[line.index("hpc_lbsgd.cli") + 1 :] for line in starts if "hpc_lbsgd.cli" in line and "own" not in line]


def hears(scheduler: str, signal: str) -> bool:
    assert scheduler in SCHEDULERS
    script = render(Job("train", "x", 1, [], "", run="RUN"), Site(scheduler=scheduler), "python")
    return bool(re.search(rf"^trap stop .*\b{signal}\b", script, re.M))
