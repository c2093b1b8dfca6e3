"""Memory that a step frees stays with the process, for the next step to use."""

from __future__ import annotations

import ctypes
import os

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLDS = (2**30, 2**25)  # bytes; glibc before 2.35 takes no more than the second
USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed. Left as it is where the environment sets malloc's thresholds, and on other C
    libraries.

    As shipped, glibc gives the activations of every backward back to the kernel and asks for them again in the next
    forward: ResNet-20 at batch 128 takes 25,000 page faults a step, a tenth of its time (docs/results/step.md).
    The process stays as large as its largest step.
    """
    if any(name in os.environ for name in USERS_OWN):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_MMAP_THRESHOLDS):
        mallopt(M_TRIM_THRESHOLD, -1)  # never
