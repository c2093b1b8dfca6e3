"""python standins SYSTEM PROGRAM WORDS: what a stand-in's command starts."""

from __future__ import annotations

import sys

import jobs
from flux import Flux
from lsf import LSF
from pbs import PBS

SYSTEMS = {"pbs": PBS, "lsf": LSF, "flux": Flux}

name, program, *words = sys.argv[1:]
system = SYSTEMS[name]()
try:
    if program == "RUN":
        jobs.run(*words, system)
    else:
        getattr(system, program)(*words)
except jobs.Refused as problem:
    sys.exit(f"{program}: {problem}")
