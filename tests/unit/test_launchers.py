"""Each MPI's launcher gets what it understands."""

import signal
import sys
import time

import pytest

from hpc_lbsgd.cluster import launch
from hpc_lbsgd.errors import EXIT_DONE, RequestError
from hpc_lbsgd.parallel.launchers import (
    Hydra,
    IntelMPI,
    Layout,
    OpenMPI,
    OpenMPI5,
    Spawn,
    check_hosts,
    choose,
    compose,
    exported,
    recognise,
)
from hpc_lbsgd.records import RunFolder

SPREAD = Layout(16, hosts="a:8,b:8")
LISTED = Layout(16, hostfile="my hosts")
CROWDED = Layout(4, oversubscribe=True)
ENVIRONMENT = {"PATH": "/x y", "A": "it's; $(x)"}
START = ["mpirun", "-np", "16", "--bind-to", "none", "--map-by", "slot"]


@pytest.mark.parametrize(
    "launcher, layout, environment, line",
    [
        (OpenMPI, SPREAD, ENVIRONMENT, [*START, "--host", "a:8,b:8", "-x", "A=it's; $(x)", "-x", "PATH=/x y"]),
        (OpenMPI, LISTED, {}, [*START, "--hostfile", "my hosts"]),
        (OpenMPI, CROWDED, {}, ["mpirun", "-np", "4", "--bind-to", "none", "--map-by", "slot", "--oversubscribe"]),
        (OpenMPI5, SPREAD, {}, [*START, "--host", "a:8,b:8"]),
        (OpenMPI5, CROWDED, {}, ["mpirun", "-np", "4", "--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]),
        (Hydra, SPREAD, ENVIRONMENT, ["mpirun", "-n", "16", "-bind-to", "none", "-hosts", "a:8,b:8",
                                      "-genv", "A", "it's; $(x)", "-genv", "PATH", "/x y"]),
        (Hydra, LISTED, {}, ["mpirun", "-n", "16", "-bind-to", "none", "-f", "my hosts"]),
        (Hydra, CROWDED, {}, ["mpirun", "-n", "4", "-bind-to", "none"]),
        (IntelMPI, SPREAD, {}, ["mpirun", "-n", "16", "-hosts", "a,b", "-ppn", "8", "-genv", "I_MPI_PIN", "0"]),
        (IntelMPI, LISTED, {}, ["mpirun", "-n", "16", "-machinefile", "my hosts", "-genv", "I_MPI_PIN", "0"]),
    ],
)  # fmt: skip
def test_line(launcher, layout, environment, line):
    assert launcher().line("mpirun", layout, environment) == line


@pytest.mark.parametrize(
    "version, launcher",
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs", OpenMPI),
        ("mpirun (Open MPI) 5.0.11\n", OpenMPI5),
        ("HYDRA build details:\n    Version:  5.0.2\n", Hydra),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: b44796a)\n", IntelMPI),
    ],
)
def test_recognised_by_what_it_prints(version, launcher):
    assert type(recognise(version)) is launcher


def test_srun_starts_the_ranks_where_a_jobs_script_says_so(monkeypatch):
    monkeypatch.setenv("HPC_LBSGD_SRUN", "srun --mpi=pmix --cpus-per-task=2")
    line = compose(Layout(4), {"A": "b"}, ["python", "x"])
    assert line == ["srun", "--mpi=pmix", "--cpus-per-task=2", "--ntasks=4", "python", "x"]


def test_environment_is_passed_by_name_to_other_hosts_only():
    mine = {"PATH": "/x", "HOROVOD_X": "1", "HOME": "/root"}
    passed = {"PATH": "/x", "HOROVOD_X": "1"}
    assert exported(Layout(2), mine) == {}
    assert exported(SPREAD, mine) == exported(LISTED, mine) == passed
    assert exported(Layout(2), mine | {"SLURM_JOB_NUM_NODES": "2"}) == passed
    for batch in ("PBS_NODEFILE", "LSB_MCPU_HOSTS"):  # mpirun finds their hosts by itself
        assert exported(Layout(2), mine | {batch: "x"}) == passed
    asked = {"HPC_LBSGD_EXPORT": "ODD,HOME", "ODD": "1"}  # a site's `environment`
    assert exported(SPREAD, mine | asked) == passed | asked | {"HOME": "/root"}


def test_hosts_may_have_underscores():
    check_hosts("gpu_node_1:8,b:8", 16)


def test_an_unknown_or_another_launcher_is_refused(tmp_path):
    mpirun = tmp_path / "mpirun"
    for text, flavour, said in (("Platform MPI 9", None, "'Platform MPI 9'"), ("HYDRA", "openmpi", "is mpich")):
        mpirun.write_text(f"#!/bin/sh\necho {text}\n")
        mpirun.chmod(0o755)
        with pytest.raises(RequestError, match=said):
            choose(str(mpirun), flavour)


@pytest.mark.parametrize("hosts, said", [("a:8,b:x", "'b:x'"), ("a:8,--evil", "'--evil'"), ("a:4,b", "room for 5")])
def test_wrong_hosts_are_refused(hosts, said):
    with pytest.raises(RequestError, match=said):
        check_hosts(hosts, 16)


def test_intel_mpi_says_that_it_wants_even_hosts():
    with pytest.raises(RequestError, match="--hostfile"):
        IntelMPI().line("mpirun", Layout(12, hosts="a:8,b:4"), {})


def test_a_launcher_that_misses_the_end_of_its_ranks_is_ended(tmp_path, monkeypatch):
    """Open MPI 5's mpirun stays at times after its ranks are gone. What an earlier start left does not count."""
    monkeypatch.setattr(launch, "END_GRACE_S", 0.5)
    folder = RunFolder(tmp_path)
    folder.write_status("stopped", step=3)
    script = f"""
import time
from hpc_lbsgd.records import RunFolder
time.sleep(3)
RunFolder({str(tmp_path)!r}).write_status("done", step=9)
time.sleep(60)"""
    start = time.monotonic()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)}
    asked = launch.Asked(folder)
    assert launch.run(Spawn(), Layout(1), [sys.executable, "-c", script], folder, asked) == EXIT_DONE
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert 3 < time.monotonic() - start < 30
