"""Namespaces of Linux: mounts that end with this process, and ranks that have each a network interface of their own.

Nothing outside of them changes. They need root.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

NEW_MOUNTS, NEW_NETWORK = 0x00020000, 0x40000000  # CLONE_NEWNS, CLONE_NEWNET
PRIVATE, RECURSIVE, BIND, REMOUNT, READ_ONLY = 1 << 18, 16384, 4096, 32, 1
libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *words) -> None:
    if getattr(libc, name)(*words):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: Path | str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    words = [word and str(word).encode() for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), options and options.encode())


def unmount(target: Path) -> None:
    _call("umount2", str(target).encode(), 2)  # at once, whoever still looks at it


def own_mounts() -> None:
    """From here on this process and what it starts mount for themselves."""
    _call("unshare", NEW_MOUNTS)
    mount("none", "/", flags=PRIVATE | RECURSIVE)


def own_network() -> None:
    _call("unshare", NEW_NETWORK)


@functools.cache
def why_not(*programs: str) -> str | None:
    """The reason why there are no namespaces here."""
    if os.geteuid():
        return "namespaces need root"
    if subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True).returncode:
        return "namespaces are not permitted"
    missing = [p for p in programs if subprocess.run(["which", p], capture_output=True).returncode]
    return f"no program {', '.join(missing)}" if missing else None


class Network:
    """A switch in a namespace of its own, and a cable to it from the namespace of each process that asks: as nodes of
    a cluster have them. Addresses are 10.78.0.1 and so on."""

    def __init__(self):
        reader, writer = os.pipe()
        self.switch = os.fork()
        if not self.switch:  # it only holds the namespace
            try:
                os.close(reader)
                own_network()
                os.write(writer, b"x")
                os.close(writer)
                time.sleep(600)
            finally:
                os._exit(0)
        os.close(writer)
        ready = os.read(reader, 1)
        os.close(reader)
        if not ready:
            raise OSError("no network namespace")
        self._ip(self.switch, "link add s type bridge", "link set s up")

    @staticmethod
    def _ip(pid: int, *lines: str) -> None:
        line = ["nsenter", f"--target={pid}", "--net", "ip", "-batch", "-"]
        subprocess.run(line, input="\n".join(lines) + "\n", text=True, check=True, capture_output=True)

    @staticmethod
    def address(number: int) -> str:
        return f"10.78.0.{number + 1}"

    def plug_in(self, pids: Sequence[int]) -> None:
        """Each of these processes has a network namespace of its own by now."""
        ends = [f"link add v{n} type veth peer name eth0 netns {pid}" for n, pid in enumerate(pids)]
        self._ip(self.switch, *ends, *(f"link set v{n} master s up" for n in range(len(pids))))
        for n, pid in enumerate(pids):
            self._ip(pid, "link set lo up", f"addr add {self.address(n)}/24 dev eth0", "link set eth0 up")

    def cut(self, number: int) -> None:
        """Nothing passes any more, and nobody is told, as with a switch that lost its tables."""
        self._ip(self.switch, f"link set v{number} nomaster")

    def unplug(self, number: int) -> None:
        """The link is down at both ends."""
        self._ip(self.switch, f"link set v{number} down")

    def end(self) -> None:
        os.kill(self.switch, 9)
        os.waitpid(self.switch, 0)
