"""How texts and bytes become numbers: functions of the user's own (`data.encode`), a sample at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hpc_lbsgd.data.manifest import Manifest
from hpc_lbsgd.data.targets import widened
from hpc_lbsgd.errors import RunError
from hpc_lbsgd.imports import load, place_of


class Encoders:
    """named: of fields, package.module:function, called with a text, or with bytes, and returning numbers.

    A function sees one sample, so that what it returns depends on no batch; and is in one thread at a time, for
    tokenizers may not be asked twice at once.
    """

    def __init__(self, named: Mapping[str, str], manifest: Manifest):
        self.named, self.manifest, self._lock = named, manifest, threading.Lock()
        self._functions = {name: load(function, f"data.encode.{name}") for name, function in named.items()}

    def encoded(self, name: str, samples: np.ndarray, values: Sequence) -> torch.Tensor:
        """Numbers of each value, one row a sample. Raises RunError where the function fails, or returns no numbers, or
        another number of them than for a sample before."""
        said, rows = f"data.encode = {{{name}: {self.named[name]}}}", []
        for sample, value in zip(samples.tolist(), values, strict=True):
            where = self.manifest.file(sample)
            try:
                with self._lock:
                    made = self._functions[name](value if isinstance(value, str) else value.tobytes())
                # copied: it may be what must not be written, or what the function writes the next one into
                made = made.copy() if isinstance(made, np.ndarray) else made
                rows.append(torch.as_tensor(made).clone())
            except Exception as problem:  # of anyone's code
                told = f"{type(problem).__name__}: {problem}{place_of(problem)}"
                raise RunError(f"{said}: of {where}: {told}") from None
            if rows[-1].shape != rows[0].shape:
                raise RunError(
                    f"{said}: gave {tuple(rows[-1].shape)} numbers of {where}, and {tuple(rows[0].shape)} of a sample "
                    "before; a batch is one tensor: cut and pad to one length"
                )
            if rows[-1].dtype != rows[0].dtype:
                raise RunError(f"{said}: gave {rows[-1].dtype} of {where}, and {rows[0].dtype} of a sample before")
        return widened(torch.stack(rows))
