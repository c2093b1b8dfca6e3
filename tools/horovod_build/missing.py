"""What stops a build before it starts."""

from __future__ import annotations


class Missing(Exception):
    """The build cannot start; the message says what to install."""
