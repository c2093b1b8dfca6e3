"""A process that makes batches of a user's own set, beside the rank that asks for them (`machine.loader_processes`).

Requests and batches are pickled through its pipes, between two processes of one program. It ends when its standard
input does, however the rank ends.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from typing import BinaryIO

import torch

from hpc_lbsgd.data.source import Batch
from hpc_lbsgd.data.storage import Request
from hpc_lbsgd.data.user import UserSet, collected
from hpc_lbsgd.errors import RequestError, RunError
from hpc_lbsgd.signals import STOPS


class Maker:
    """The rank's end of such a process. Used by one thread at a time."""

    def __init__(self, data: UserSet, seed: int):
        self.data = data
        # what stops a run is for its rank: a process keeps the mask that it was started with
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            words = [sys.executable, "-m", "hpc_lbsgd.data.maker"]
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._ask((data.name, data.part, seed, torch.get_num_threads()))
        found = self._answer()
        if found != data.fingerprint:
            raise RunError(
                f"data.dataset = {data.name}: made a second time, in a process of its own, it is another set (its "
                "length or `fingerprint`); what is random in it must be seeded"
            )

    def make(self, request: Request) -> Batch:
        self._ask(request)
        return self._answer()

    def _ask(self, what) -> None:
        with suppress(BrokenPipeError):  # it has ended: that is said where its answer is read
            pickle.dump(what, self.process.stdin)
            self.process.stdin.flush()

    def _answer(self):
        try:
            problem, found = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise RunError(
                f"data.dataset = {self.data.name}: a process that makes its samples has ended (exit code "
                f"{self.process.wait()}): where memory ran out, fewer may do (machine.loader_processes)"
            ) from None
        if problem:
            raise RunError(f"data.dataset = {self.data.name}: in a process that makes its samples:\n{problem}")
        return found

    def __del__(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    def answer(function, *arguments):
        try:
            told = (None, function(*arguments))
        except RequestError as problem:
            told = (str(problem), None)
        except Exception:  # of anyone's code
            told = (traceback.format_exc(), None)
        pickle.dump(told, answers)
        answers.flush()

    name, part, seed, threads = pickle.load(asked)
    torch.set_num_threads(threads)  # their number may change a sum's bits
    data = None

    def begin() -> str:
        nonlocal data
        data = UserSet(name, part)
        return data.fingerprint

    answer(begin)
    while True:
        try:
            request = pickle.load(asked)
        except EOFError:
            return
        answer(collected, data, seed, request)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a user prints is no answer
    try:
        serve(sys.stdin.buffer, answers)
    except BrokenPipeError:
        os._exit(0)  # the rank has ended
