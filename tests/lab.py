"""A real Slurm of 32 nodes with 8 GPUs each, on one machine: for tests.

Everything lives in one network and one process namespace, so that nothing is reachable from outside and the end of the
lab is the end of every process in it. Each node has its own host name, /dev/shm and /tmp, as MPI wants it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import records

NODES = 32
OVER = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
LIBPMIX = "/usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so"  # Slurm's plugin opens it under this name
NEEDED = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "ip": "iproute2"}
ROOT = Path(__file__).parents[1]

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
KillWait=5
MinJobAge=300
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=500000 Gres=gpu:8 State=UNKNOWN"
)

# Process 1 of the lab. slurmctld and the nodes are its children; they end with it.
LAB_SH = """\
set -eu
root=$1; shift
ip link set lo up
ip link add eth0 type veth peer name eth1   # with lo alone Slurm's clients find no address
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up
ip link set eth1 up
export SLURM_CONF=$root/slurm.conf
munged --socket="$root/munge/munge.sock" --key-file="$root/key/munge.key" --log-file="$root/log/munged.log" \\
    --pid-file="$root/run/munged.pid" --seed-file="$root/key/seed" --num-threads=10
. "$root/before.sh"
slurmctld
for node in $(cat "$root/nodes"); do bash "$root/node.sh" "$root" "$node" "$@" & done
touch "$root/started"
while true; do sleep 3600 & wait $! || true; done
"""
# One node; the folders that all nodes share are kept visible under the node's own /tmp.
NODE_SH = """\
set -eu
root=$1 node=$2; shift 2
unshare --uts --mount --ipc --pid --fork --kill-child --mount-proc bash "$root/init.sh" "$root" "$node" "$@" &
echo $! > "$root/run/$node.pid"
wait
"""
INIT_SH = """\
set -eu
root=$1 node=$2; shift 2
hostname "$node"
mount -t tmpfs none /dev/shm
mount -t tmpfs none /mnt
n=0
for folder; do n=$((n + 1)); mkdir /mnt/$n; mount --bind "$folder" /mnt/$n; done
mount -t tmpfs none /tmp
chmod 1777 /tmp /dev/shm
n=0
for folder; do n=$((n + 1)); mkdir -p "$folder"; mount --move /mnt/$n "$folder"; done
mount --bind "$root/hosts" /etc/hosts
. "$root/node-before.sh"
export SLURM_CONF=$root/slurm.conf
slurmd -D -N "$node" &  # not as process 1, which would leave zombies
wait
"""


def why_not() -> str | None:
    """The reason why a lab cannot run here."""
    if os.geteuid() != 0:
        return "the Slurm lab needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = sorted({package for program, package in NEEDED.items() if not shutil.which(program, path=path)})
    if missing:
        return f"the Slurm lab needs: apt-get install {' '.join(missing)}"
    if not Path(LIBPMIX).exists():
        return "the Slurm lab needs: apt-get install libpmix-dev"
    if subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "the Slurm lab needs namespaces (unshare), which are not permitted here"
    return None


class Lab:
    """`root`: its own folder. shared: folders that all nodes see under the same path."""

    size, node, prefix = NODES, NODE, "node"
    node_before = ""  # what its shell does before a node's daemon is started

    def __init__(self, root: Path, shared: list[Path]):
        self.root, self.folders = root, shared
        for name in ("munge", "key", "ctld", "spool", "run", "log", "dev"):
            (root / name).mkdir(parents=True)
        (root / "munge").chmod(0o711)
        (root / "key").chmod(0o700)
        (root / "key" / "munge.key").write_bytes(os.urandom(128))
        (root / "key" / "munge.key").chmod(0o600)
        self.nodes = [f"{self.prefix}{i:02d}" for i in range(1, self.size + 1)]
        (root / "nodes").write_text("\n".join(self.nodes) + "\n")
        for name in self.nodes:
            (root / "spool" / name).mkdir()
        (root / "slurm.conf").write_text(self.conf())
        self.make_devices()
        (root / "hosts").write_text("127.0.0.1 localhost " + " ".join(self.nodes) + "\n")
        hidden = [str(p) for p in dict.fromkeys(shared) if p.is_relative_to("/tmp")]
        scripts = (("lab", LAB_SH), ("node", NODE_SH), ("init", INIT_SH), ("before", self.before()))
        for name, text in (*scripts, ("node-before", self.node_before)):
            (root / f"{name}.sh").write_text(text)
        self.shared = hidden
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_"))},
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(root / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
        }
        space = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(root / "log" / "lab.log", "w") as log:
            self.holder = subprocess.Popen(
                [*space, "bash", root / "lab.sh", root, *hidden], stdout=log, stderr=log, env=self.env
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def conf(self) -> str:
        lines = [self.node.format(name=name, port=17001 + i) for i, name in enumerate(self.nodes)]
        return SLURM_CONF.format(root=self.root, nodes="\n".join(lines))

    def make_devices(self) -> None:
        names = f"{self.prefix}[01-{self.size:02d}]"
        (self.root / "gres.conf").write_text(f"NodeName={names} Name=gpu File={self.root}/dev/nvidia[0-7]\n")
        for i in range(8):
            os.mknod(self.root / "dev" / f"nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))  # /dev/null's twin

    def before(self) -> str:
        """What the lab's shell does before the controller is started."""
        return ""

    def _wait_until_up(self, within_s: float = 60) -> None:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            assert self.holder.poll() is None, (self.root / "log" / "lab.log").read_text()
            if (self.root / "started").exists():
                up = self.call("sinfo", "-h", "-N", "-p", "gpu", "-t", "idle", "-o", "%N", check=False)
                if len(up.stdout.split()) == self.size:
                    return
            time.sleep(0.3)
        pytest.fail(f"the lab's nodes did not come up: {(self.root / 'log' / 'lab.log').read_text()}")

    def inside(self) -> list[str]:
        """Words that run a command in the lab."""
        child = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()[0]
        return ["nsenter", f"--target={child}", "--net", "--pid", "--mount"]

    def call(self, *words, timeout: float = 60, check: bool = True, cwd=None, env=None) -> subprocess.CompletedProcess:
        """Run a command in the lab, as a user on the login node would."""
        line = [*self.inside(), f"--wd={cwd or self.root}", *map(str, words)]
        result = subprocess.run(line, capture_output=True, text=True, timeout=timeout, env={**self.env, **(env or {})})
        assert not check or result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
        return result

    def command(self, *words, **kwargs) -> subprocess.CompletedProcess:
        """`hpc-lbsgd WORDS` on the login node."""
        return self.call(sys.executable, "-m", "hpc_lbsgd.cli", *words, **kwargs)

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.call("scontrol", "show", "job", number, "-o").stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: int, within_s: float = 120) -> dict[str, str]:
        """The job's facts when it is over."""
        return self.wait_for(number, lambda job: job["JobState"] in OVER, within_s)

    def wait_for(self, number: int, is_so, within_s: float = 120) -> dict[str, str]:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            job = self.job(number)
            if is_so(job):
                return job
            time.sleep(0.5)
        log = Path(job["StdOut"])
        said = log.read_text()[-3000:] if log.is_file() else "(no log)"
        pytest.fail(f"job {number} after {within_s} s: {job}\n{said}")

    def kill_node(self, name: str) -> None:
        """As by the power switch."""
        self.call("kill", "-KILL", self.init_of(name))

    def init_of(self, name: str) -> str:
        """A node's process 1, by its number in the lab."""
        pid = (self.root / "run" / f"{name}.pid").read_text().strip()
        return self.call("cat", f"/proc/{pid}/task/{pid}/children").stdout.split()[0]

    def start_node(self, name: str) -> None:
        """Switch a killed node on again, once Slurm has missed it: one that is back before that stays "completing" for
        a minute, for the sake of the job that died with it."""
        self.wait_for_node(name, "DOWN.*")
        subprocess.Popen(
            [*self.inside(), "bash", self.root / "node.sh", self.root, name, *self.shared],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.env,
        )  # fmt: skip
        self.wait_for_node(name, "IDLE")

    def wait_for_node(self, name: str, state: str, within_s: float = 300) -> None:
        end, seen = time.monotonic() + within_s, [""]
        while time.monotonic() < end:
            # sinfo may go on saying "mix" of a node that went down with a job on it
            now = re.search(r"State=(\S+)", self.call("scontrol", "show", "node", name).stdout)[1]
            if now != seen[-1]:
                seen.append(now)
            if re.fullmatch(state, now):
                return
            time.sleep(0.5)
        pytest.fail(f"{name} is not {state}: was {seen[1:]}\n{self.call('scontrol', 'show', 'node', name).stdout}")

    def stop(self) -> None:
        """The end of the namespace's process 1 ends every process in it."""
        if self.holder.poll() is None:
            self.holder.kill()  # --kill-child
            self.holder.wait(timeout=30)
        shutil.rmtree(self.root.parent, ignore_errors=True)


def start(folder: Path, kind: type[Lab] = Lab) -> Lab:
    """A lab whose nodes see the pytest folder `folder`, this checkout and its environment, wherever they are."""
    root = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
    root.chmod(0o711)  # munge wants to be reachable by everyone, which pytest's own folders are not
    try:
        return kind(root / "lab", [root, folder, ROOT, Path(sys.prefix).resolve()])
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise


def submitted(text: str) -> list[int]:
    """Job numbers in what sbatch or `submit` printed."""
    return [int(n) for n in re.findall(r"Submitted batch job (\d+)", text)]


def site(folder, name="site", **keys):
    path = folder / f"{name}.yaml"
    path.write_text(
        json.dumps({"partition": "gpu", "time_limit": "00:10:00", "warn_s": 60, "gpus_per_node": 0, **keys})
    )
    return path


def submit(lab, recipe, run, *more, cwd=None):
    """Submit for real; returns the jobs' numbers."""
    result = lab.command("submit", recipe, "--run", run, *more, cwd=cwd or run.parent)
    return submitted(result.stderr)


def log_of(lab, number):
    return Path(lab.job(number)["StdOut"]).read_text()


class Victim:
    """A job of two or three nodes, one rank each, that is hurt in many ways. lost: nodes that died on the way."""

    def __init__(self, lab: Lab, run: Path, number: int | str):
        self.lab, self.run, self.folder, self.number = lab, run, run.parent, number
        self.lost: list[str] = []

    def log(self) -> str:
        return log_of(self.lab, self.number)

    def second_node(self) -> str:
        nodes = self.lab.call("scontrol", "show", "hostnames", self.lab.job(self.number)["NodeList"]).stdout.split()
        return [node for node in nodes if node not in self.lost][1]

    def wait_for_new_steps(self, count, within_s=200):
        """Until this start has done some steps, and has a checkpoint."""
        starts = len(records(self.run, "start"))
        first = records(self.run, "start")[-1]["step"] if starts else 0
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if any(r["step"] >= first + count for r in records(self.run, "step")):
                return
            time.sleep(0.2)
        pytest.fail(f"no {count} steps more within {within_s} s\n{self.log()}")

    def wait_for_start(self, number, within_s=200):
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if len(records(self.run, "start")) >= number:
                return
            time.sleep(0.2)
        pytest.fail(f"no start {number} within {within_s} s\n{self.lab.job(self.number)}\n{self.log()}")

    # the ways, each of which ends this start

    def signal(self):
        self.lab.call("scancel", "--batch", "--signal=USR2", self.number)

    def time_limit(self):
        self.lab.call("scontrol", "update", f"JobId={self.number}", "TimeLimit=1")
        self.lab.wait_for(self.number, lambda job: job["JobState"] != "RUNNING", 60)
        self.lab.call("scontrol", "update", f"JobId={self.number}", "TimeLimit=10")

    def preemption(self):
        script = self.folder / "urgent.sh"
        script.write_text("#!/bin/sh\nsleep 1\n")
        words = ["-p", "urgent", "--exclusive", "-w", self.second_node(), "-o", "/dev/null", script]
        self.lab.call("sbatch", *words, cwd=self.folder)

    def requeue(self):
        self.lab.call("scontrol", "requeue", self.number)

    def killed_rank(self):
        pid = json.loads((self.run / "heartbeats" / "rank-00001.json").read_text())["pid"]
        where = ["--jobid", self.number, "--overlap", "--mpi=none", "-N1", "-n1", "-w", self.second_node()]
        self.lab.call("srun", *where, "--gpus-per-node=0", "kill", "-KILL", pid)

    def killed_node(self):
        node = self.second_node()
        self.lost.append(node)
        self.lab.kill_node(node)
