"""A real Slurm as a site runs it, with what tests/lab.py leaves out: users who are not root and see nobody else's
processes or jobs, a controller that is not root, cgroups that give a job its cores and devices, accounting, and
preemption by quality of service. Two nodes, since their cores are this machine's own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from lab import Lab
from lab import why_not as why_no_lab

CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpuset", "devices", "freezer")
NEEDED = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server-core"}
USERS = {"ada": 23001, "eve": 23002}
MAJOR = 240  # of devices: for local use (Documentation/admin-guide/devices.txt); nothing is behind them
GPUS, CORES = 2, 2  # of a node

SETTINGS = {
    "SlurmUser": "slurm",
    "SlurmctldPidFile": "{root}/ctld/slurmctld.pid",
    "PreemptType": "preempt/qos",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AccountingStorageHost": "localhost",
    "AccountingStoragePort": "16819",
    "AccountingStoragePass": "{root}/munge/munge.sock",
    "AccountingStorageEnforce": "associations,limits,qos",
    "PrivateData": "accounts,jobs,usage,users",
}
WITH_CGROUPS = {"ProctrackType": "proctrack/cgroup", "TaskPlugin": "task/cgroup,task/affinity"}
WITHOUT = {"TaskPlugin": "task/affinity"}
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
ConstrainCores=yes
ConstrainDevices=yes
"""
DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=slurm
LogFile={root}/log/slurmdbd.log
PidFile={root}/ctld/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=500000 Gres=gpu:2 State=UNKNOWN"
)
# Who may preempt whom, and how long a job has then. By an administrator, as here
QOS_SH = """\
sacctmgr -i <<.
add cluster lab
add account physics
add qos urgent priority=1000
add qos spare gracetime=60 preemptmode=requeue
add qos cheap gracetime=60 preemptmode=cancel
add qos abrupt preemptmode=cancel
modify qos urgent set preempt=spare,cheap,abrupt
add user ada,eve account=physics qos=normal,urgent,spare,cheap,abrupt defaultqos=normal
.
"""
USERS_SH = """\
mount -o remount,hidepid=invisible /proc
mount --bind "$root/passwd" /etc/passwd
mount --bind "$root/group" /etc/group
"""
DATABASE_SH = """\
mkdir "$root/db"
db() {
    mariadbd --no-defaults --user=root --datadir="$root/db" --skip-grant-tables --skip-networking --skip-log-bin \\
        --innodb-flush-method=nosync --innodb-log-file-size=4M --innodb-buffer-pool-size=32M "$@"
}
{
    printf 'create database mysql;\\ncreate database slurm;\\nuse mysql;\\n'
    cat /usr/share/mysql/mysql_system_tables.sql
} | db --bootstrap
export MYSQL_UNIX_PORT=$root/run/db.sock
db --socket="$MYSQL_UNIX_PORT" &
until [ -S "$MYSQL_UNIX_PORT" ]; do sleep 0.1; done
slurmdbd
until sacctmgr -n list cluster; do sleep 0.2; done
"""


def why_not() -> str | None:
    """The reason why it cannot run here."""
    if reason := why_no_lab():
        return reason
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = sorted({package for program, package in NEEDED.items() if not shutil.which(program, path=path)})
    if missing:
        return f"the strict Slurm lab needs: apt-get install {' '.join(missing)}"
    if len(os.sched_getaffinity(0)) < CORES:
        return f"the strict Slurm lab needs {CORES} cores: its jobs are given real ones"
    return None


def why_no_cgroups() -> str | None:
    """The reason why cores can only be bound here (task/affinity), and devices not be kept from a job."""
    for name in CONTROLLERS:
        probe = CGROUPS / name / f"lab-probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as problem:
            return f"no cgroups of version 1 that root may make: {problem}"
    return None


class StrictLab(Lab):
    size, node = 2, NODE
    prefix = f"strict{os.getpid()}n"  # its cgroups are by these names, and another lab may be at work
    node_before = "mount -o remount,hidepid=invisible /proc\n"

    def conf(self) -> str:
        (self.root / "cgroup.conf").write_text(CGROUP_CONF)
        (self.root / "slurmdbd.conf").write_text(DBD_CONF.format(root=self.root))
        (self.root / "slurmdbd.conf").chmod(0o600)
        for name in ("passwd", "group"):
            more = [f"{user}:x:{uid}:" + ("" if name == "group" else f"{uid}::{self.home(user)}:/bin/bash")
                    for user, uid in USERS.items()]  # fmt: skip
            (self.root / name).write_text("\n".join([Path("/etc", name).read_text().rstrip(), *more, ""]))
        for user, uid in USERS.items():
            self.home(user).mkdir(parents=True)
            self.home(user).chmod(0o700)
            os.chown(self.home(user), uid, uid)
        for name in ("slurmctld.log", "slurmdbd.log"):
            (self.root / "log" / name).touch()
        for name in ("ctld", "slurmdbd.conf", "log/slurmctld.log", "log/slurmdbd.log"):
            shutil.chown(self.root / name, "slurm", "slurm")
        if reason := why_no_cgroups():
            warnings.warn(f"the strict Slurm lab binds cores, and keeps no device from a job: {reason}", stacklevel=1)
        settings = SETTINGS | (WITHOUT if reason else WITH_CGROUPS)
        usual = [line for line in super().conf().splitlines() if line.split("=")[0] not in settings]
        usual = [line for line in usual if not line.startswith("PartitionName=urgent")]
        *nodes, partition = usual  # which stand last
        return "\n".join([*nodes, *(f"{k}={v.format(root=self.root)}" for k, v in settings.items()), partition, ""])

    def make_devices(self) -> None:
        gres = f"NodeName={self.prefix}[01-02] Name=gpu File={self.root}/dev/nvidia[0-1]\n"
        (self.root / "gres.conf").write_text(gres)
        for i in range(GPUS):
            os.mknod(self.root / "dev" / f"nvidia{i}", 0o020000, os.makedev(MAJOR, i))
            (self.root / "dev" / f"nvidia{i}").chmod(0o666)

    def before(self) -> str:
        return "\n".join([self.open_folders(), USERS_SH, DATABASE_SH, QOS_SH])

    def open_folders(self) -> str:
        """Shell lines after which every user reaches the checkout and its Python, in the lab's own view of the files:
        whatever else the closed folders above them hold is hidden there."""
        folders = dict.fromkeys([*self.folders, Path(sys.base_prefix).resolve()])
        closed = {f: top for f in folders if (top := closed_above(f))}
        aside = {f: self.root / "aside" / str(i) for i, f in enumerate(closed)}
        words = [["mkdir", "-p", p] for p in aside.values()] + [["mount", "--bind", f, p] for f, p in aside.items()]
        words += [["mount", "-t", "tmpfs", "-o", "mode=755", "none", top] for top in dict.fromkeys(closed.values())]
        words += [w for f, p in aside.items() for w in (["mkdir", "-p", f], ["mount", "--bind", p, f])]
        return "\n".join(shlex.join(map(str, w)) for w in words)

    def home(self, user: str) -> Path:
        return self.root / "home" / user

    def words_of(self, user: str, *words, cwd: Path | None = None) -> list:
        """Words that run a command as a user on the login node would: nothing that he makes is others' to read."""
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        shell = 'umask 077; export HOME=$1 USER=$2; unset ${!OMPI_@}; cd "$3"; shift 3; exec "$@"'
        return [*who, "bash", "-c", shell, "-", self.home(user), user, cwd or self.home(user), *words]

    def as_user(self, user: str, *words, cwd: Path | None = None, **more) -> subprocess.CompletedProcess:
        return self.call(*self.words_of(user, *words, cwd=cwd), cwd="/", **more)

    def stop(self) -> None:
        super().stop()
        for controller in CONTROLLERS:
            for node in self.nodes:
                top = CGROUPS / controller / f"slurm_{node}"
                for folder in sorted([top, *top.rglob("*")], reverse=True):
                    if folder.is_dir():
                        folder.rmdir()


def closed_above(folder: Path) -> Path | None:
    """The uppermost folder that keeps others from reaching it."""
    return next((p for p in reversed(folder.parents) if not p.stat().st_mode & 0o001), None)
