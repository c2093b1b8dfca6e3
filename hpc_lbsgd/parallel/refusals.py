"""What mpirun says instead of starting ranks, in one line. Open MPI says it in pages of up to 26 lines between rules;
the other launchers say theirs in a line already, and it is left as it is."""

from __future__ import annotations

import os
import re
import select
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import IO

from hpc_lbsgd.parallel.launchers import Launcher, Layout, starter

HOLD_S = 0.5  # a page that mpirun writes comes at once; what is not complete by then is a rank's, and is passed on
END_S = 5.0  # for a pipe to end with its launcher; what a host is left with may hold it open

# Of Open MPI 4 and 5: a pattern in a page, line ends and blanks being one blank each, and what to say in its place;
# groups of the pattern fill it.
PAGES = (
    (r"not enough slots available in the system to satisfy the (?P<ranks>\d+) slots",
     "{ranks} ranks, but there are {slots} (one a core, or what the batch system gave this job); "
     "start fewer, or allow more ranks than that with --oversubscribe"),
    (r"hosts? (?:is|are) not included in the current allocation(?:.*Missing requested host: (?P<host>\S+))?",
     "host {host} is not one of this job's nodes"),
    (r"could not access (?:or execute )?an executable: Executable: (?P<what>.+?) Node: (?P<host>\S+)",
     "{what} cannot be started on {host}: the environment must be at the same place on all hosts"),
    (r"tried to fork a new process.*Local host: (?P<host>\S+) .*Application name: (?P<what>.+?) Error: (?P<why>.+?) --",
     "{what} cannot be started on {host}: {why}"),
    (r"parse error in the hostfile: (?P<what>.+?) It occ.*line number (?P<line>\d+)",
     "{what}, line {line}: not a line of a hostfile, such as: node1 slots=8"),
    (r"daemon failed to report back.*Remote host: (?P<host>\S+)|unable to reliably start one or more daemons",
     "nothing can be started on host {host}: is the name right, and does `ssh {host} true` end without a question? "
     "Open MPI must be at the same place there, and no firewall between"),
    (r"plm_(?:ssh|rsh)_agent|No available launching agents",
     "ranks on other hosts are started through ssh, which is not installed here"),
    (r"attempt to run as root",
     "Open MPI does not start ranks as root; in a container, where there is no other user, set "
     "OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"),
)  # fmt: skip
NOTHING_NEW = r"one or more processes exited with non-zero status.*Exit code: 2 "  # that rank has said why
RULE = re.compile(rb"-{40,}\s*\n")
FIRST = re.compile(rb"-{40,}\s*\n|\S+ has detected an attempt to run as root")  # PRRTE's page on root has no first rule


def refusal(said: str, layout: Layout, flavour: str | None = None) -> str | None:
    """What was wrong with a request, from all that its launcher said; None where it is nothing of this kind."""
    for pattern, words in PAGES:
        found = re.search(pattern, flat(said))
        if found:
            facts = {key: value or "HOST" for key, value in found.groupdict().items()}
            return words.format(**facts, slots=slots(layout, flavour) if "{slots}" in words else None)
    return None


def slots(layout: Layout, flavour: str | None = None) -> str:
    """How many ranks mpirun would start there, asked of itself: it alone knows batch systems and hostfiles."""
    launcher, path = starter(flavour)
    if not launcher.writes_pages:
        return "fewer slots"
    line = [*launcher.line(path, replace(layout, ranks=1), {}), "--display-allocation", "true"]
    try:
        said = subprocess.run(line, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "fewer slots"
    listed = re.split(r"ALLOCATED NODES.*", said)[1:2]  # Open MPI 5 prints it for itself and for the job
    found = sum(int(number) for number in re.findall(r"\bslots=(\d+)", "".join(listed)))
    return f"{found} slot{'s' if found != 1 else ''}" if found else "fewer slots"


def flat(text: str) -> str:
    return " ".join(text.split())


class Pages:
    """Takes a stream apart into pages of mpirun that say why nothing started, and all the rest."""

    def __init__(self):
        self.kept = ""  # those pages
        self._held, self._fresh = b"", True  # fresh: what comes next begins a line
        self._after_page = False  # Open MPI 5 ends a page with a zero byte

    def feed(self, data: bytes) -> bytes:
        """What to pass on now; the beginning of what may be such a page is held back."""
        self._held += data.lstrip(b"\0") if self._after_page else data
        self._after_page = False
        out = b""
        while self._held:
            first = FIRST.match(self._held) if self._fresh else None
            if first:
                last = RULE.search(self._held, first.end())
                if not last:
                    break
                page, self._held = self._held[: last.end()], self._held[last.end() :].lstrip(b"\0")
                self._after_page = not self._held
                out += self._judge(page)
                continue
            line, end, rest = self._held.partition(b"\n")
            if self._fresh and not end and not line.strip(b"-"):  # a rule, as far as it is here
                break
            out, self._held, self._fresh = out + line + end, rest, bool(end)
        return out

    def flush(self) -> bytes:
        """What was held back, as it seems to be no page, or has no end."""
        held, self._held = self._held, b""
        self._fresh = held.endswith(b"\n") if held else self._fresh
        return held

    def _judge(self, page: bytes) -> bytes:
        text = page.decode(errors="replace")
        if any(re.search(pattern, flat(text)) for pattern, _ in PAGES):
            self.kept += text
        return b"" if self.kept or re.search(NOTHING_NEW, flat(text)) else page


def pass_on(source: IO[bytes], target: int, pages: Pages) -> threading.Thread:
    """Copy a pipe to a file descriptor as it comes, less such pages, to the pipe's end; a terminal may be closed."""

    def copy() -> None:
        data = None
        while data != b"":
            there, _, _ = select.select([source], [], [], HOLD_S)
            data = os.read(source.fileno(), 65536) if there else None
            out = pages.feed(data) if data else pages.flush()
            with suppress(OSError):
                while out:
                    out = out[os.write(target, out) :]

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def start(launcher: Launcher, line: list[str], **how) -> tuple[subprocess.Popen, Callable[[], str]]:
    """A launcher at work, its ranks' output passed on; and what, once it has ended, it said of why nothing started."""
    if not launcher.writes_pages:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, **how), lambda: ""
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, **how
    )
    pages = Pages(), Pages()
    threads = [pass_on(process.stdout, 1, pages[0]), pass_on(process.stderr, 2, pages[1])]

    def said() -> str:
        for thread in threads:
            thread.join(END_S)
        return "".join(p.kept for p in pages)

    return process, said
