"""Commands: short ones give their output, long ones a moving line and a log."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path


def run(*command: str | Path, **kwargs) -> str:
    """Output of a command; raises CalledProcessError with both streams kept."""
    return subprocess.run([str(c) for c in command], check=True, text=True, capture_output=True, **kwargs).stdout


def run_with_progress(command: list[str], log: Path, env: dict[str, str]) -> None:
    """Run a long command, its output in `log`, with one moving line: percent, time, time left."""
    shown = sys.stderr.isatty()
    start = last = time.monotonic()
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
        ) as process,
    ):
        percent = 0
        for line in process.stdout:
            out.write(line)
            found = re.search(r"\[\s*(\d+)%\]", line)
            percent = max(percent, int(found.group(1))) if found else percent
            now = time.monotonic()
            if found and now - last > (1 if shown else 30):
                last = now
                left = (now - start) * (100 - percent) / max(percent, 1)
                print(
                    f"{chr(13) if shown else ''}building Horovod {percent:3d} %  {now - start:4.0f} s, "
                    f"about {left:.0f} s left ",
                    end="" if shown else "\n",
                    file=sys.stderr,
                    flush=True,
                )
    if shown:
        print(file=sys.stderr)
    if process.returncode:
        lines = log.read_text().splitlines()
        errors = [line for line in lines if re.search(r"error[: ]|CMake Error|Error \d", line)][:12]
        raise RuntimeError("building Horovod failed:\n  " + "\n  ".join(errors or lines[-20:]))
