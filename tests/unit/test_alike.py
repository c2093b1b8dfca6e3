"""Ranks of one job must be alike; the one that is not is named."""

import pytest

from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import validate
from hpc_lbsgd.train import alike

HOSTS = ["a", "b", "c"]


def test_who_is_not_as_the_others_is_named():
    mine = alike.facts(validate({}))
    alike.refuse_other([mine] * 3, HOSTS)
    for what in mine:
        for rank in range(3):
            found = [mine | ({what: "old"} if r == rank else {}) for r in range(3)]
            with pytest.raises(RequestError, match=rf"rank {rank} on {HOSTS[rank]} has .* old, most have"):
                alike.refuse_other(found, HOSTS)


def test_clocks():
    alike.refuse_clocks([5000.0, 5030.0, 4980.0], HOSTS)
    with pytest.raises(RequestError, match=r"the clock of rank 1 on b is \+3600 s off"):
        alike.refuse_clocks([5000.0, 8600.0, 5000.0], HOSTS)
