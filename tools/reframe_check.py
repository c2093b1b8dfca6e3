"""Checks for ReFrame (reframe-hpc.readthedocs.io): does this machine do what it should, and as fast as it did.

    reframe -C SITE.py -c tools/reframe_check.py -r

The environment is .venv beside this file's folder, or HPC_LBSGD_ENVIRONMENT, as `make module` sets it. What a rate
should be is the site's to say: `reframe -S reference=...`, or in a class of its own made from Scaling.
"""

import os
from pathlib import Path

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.backends import getlauncher
from reframe.core.builtins import parameter, performance_function, run_before, sanity_function, variable

ENVIRONMENT = os.environ.get("HPC_LBSGD_ENVIRONMENT", str(Path(__file__).resolve().parents[1] / ".venv"))
LINE = r"^scaling: mode={mode} ranks={ranks} .*images_per_s=(?P<rate>\S+) efficiency=(?P<efficiency>\S+) "


class Command(rfm.RunOnlyRegressionTest):
    """hpc-lbsgd starts its ranks itself, with this environment's mpirun, in the nodes that ReFrame asked for."""

    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    executable = f"{ENVIRONMENT}/bin/hpc-lbsgd"

    @run_before("run")
    def start_it_alone(self):
        self.job.launcher = getlauncher("local")()


@rfm.simple_test
class Doctor(Command):
    """What the environment lacks, and whether two ranks a node can sum."""

    executable_opts = ["doctor", "--mpi"]

    @sanity_function
    def nothing_fails(self):
        return sn.assert_eq(self.job.exitcode, 0)


@rfm.simple_test
class Scaling(Command):
    """Images a second of a training step on one rank and on many, and the efficiency between them."""

    mode = parameter(["weak", "strong"])
    ranks = variable(int, value=2)
    steps = variable(int, value=20)
    rounds = variable(int, value=5)
    oversubscribe = variable(bool, value=False)

    @run_before("run")
    def say_what(self):
        self.num_tasks = self.ranks
        self.executable_opts = ["bench", "scaling", "--mode", self.mode, "--ranks", f"1,{self.ranks}"]
        self.executable_opts += ["--steps", str(self.steps), "--rounds", str(self.rounds), "--out", "scaling"]
        self.executable_opts += ["--oversubscribe"] if self.oversubscribe else []

    def line(self, ranks: int) -> str:
        return LINE.format(mode=self.mode, ranks=ranks)

    @sanity_function
    def both_were_measured(self):
        return sn.all([sn.assert_found(self.line(ranks), self.stdout) for ranks in (1, self.ranks)])

    @performance_function("images/s")
    def images_per_s(self):
        return sn.extractsingle(self.line(self.ranks), self.stdout, "rate", float)

    @performance_function("1")
    def efficiency(self):
        return sn.extractsingle(self.line(self.ranks), self.stdout, "efficiency", float)
