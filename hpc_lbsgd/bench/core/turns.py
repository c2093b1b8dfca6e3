"""Who goes when. Contenders take turns, so that a machine whose speed drifts treats all alike; the order changes from
round to round, so that nobody always follows the same neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Contender = TypeVar("Contender")


def rotated(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The order of one round: each begins with another contender."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def there_and_back(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The order of one round: every other one is in reverse."""
    return list(contenders if number % 2 == 0 else reversed(contenders))
