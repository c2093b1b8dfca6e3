"""The two ways a command fails, the exit codes that go with them, and how messages help."""

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_STOPPED = 0, 1, 2, 75
EXIT_INTERRUPTED = 130  # by Ctrl-C, at once: as shells have it


class RequestError(Exception):
    """The request was wrong (recipe, flag, path, data): one message that names key and value, exit code 2."""


class RunError(Exception):
    """The work failed: what happened, where, and what to do; exit code 1.

    everywhere: every rank raises it at the same point, so that one of them may speak for all.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question behind a message, where a known word is near."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
