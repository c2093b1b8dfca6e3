"""The search over groups of settings, from launches that are given to it. Pure.

Group after group is swept around the best setting so far. A setting takes its place only if it is faster by more than
the spread between rounds, and what remains at the end must win once more, in new launches, against the defaults: the
fastest of many noisy measurements is partly the luckiest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

from hpc_lbsgd.bench.core.spread import SPREAD_ROUNDS, spread

SCREENING_ROUNDS = 2  # that all settings of a group run; the better half runs the rest
CONFIRMATION = "confirmation"  # the group that is launched last

Setting = dict  # machine keys that differ from their defaults


class Launched(NamedTuple):
    """One launch of one setting: its rows by batch, and what its ranks found in their environment."""

    rows: dict[int, dict]
    environment: dict[str, str]


class Verdict(NamedTuple):
    """How many times as fast a setting is as what it was held against, in the same round."""

    ratio: float  # median over rounds
    low: float
    high: float
    rounds: int

    @property
    def wins(self) -> bool:
        """Faster by more than the spread; so it is faster in every round."""
        return self.rounds >= SPREAD_ROUNDS and self.ratio - 1 > self.high - self.low


class Trial(NamedTuple):
    group: str
    setting: Setting
    verdict: Verdict
    launched: list[Launched]


class Search(NamedTuple):
    best: Setting
    trials: list[Trial]


def judge(held_against: list[Launched], setting: list[Launched]) -> Verdict:
    """Round by round; over several batches the geometric mean of their ratios."""

    def ratio(before: Launched, after: Launched) -> float:
        logs = [math.log(before.rows[b]["step_s"] / row["step_s"]) for b, row in after.rows.items()]
        return math.exp(sum(logs) / len(logs))

    each = [ratio(*pair) for pair in zip(held_against, setting, strict=True)]
    return Verdict(*spread("ratio", each).values(), len(each))


def sweep(
    group: str, best: Setting, offered: list[Setting], rounds: int, measure: Callable[[str, list[Setting], int], list]
) -> list[Trial]:
    """Every setting against `best` in the same rounds; after the screening only the better half of them."""
    screening = min(SCREENING_ROUNDS, rounds)
    reference, *found = measure(group, [best, *offered], screening)
    order = sorted(range(len(offered)), key=lambda i: judge(reference, found[i]).ratio, reverse=True)
    kept = [i for i in order if judge(reference, found[i]).ratio > 1][: math.ceil(len(offered) / 2)]
    if kept and rounds > screening:
        more, *further = measure(group, [best, *(offered[i] for i in kept)], rounds - screening)
        for i, launched in zip(kept, further, strict=True):
            found[i] = found[i] + launched
        reference = reference + more
    return trials_of(group, reference, best, offered, found)


def trials_of(
    group: str, reference: list[Launched], best: Setting, settings: list[Setting], found: list[list[Launched]]
) -> list[Trial]:
    """What settings are held against, and each of them; some have fewer rounds."""
    return [
        Trial(group, setting, judge(reference[: len(launched)], launched), launched)
        for setting, launched in zip([best, *settings], [reference, *found], strict=True)
    ]


def search(
    groups: dict[str, list[Setting]],
    rounds: int,
    measure: Callable[[str, list[Setting], int], list],
    effect: Callable[[Setting], Hashable],
) -> Search:
    """measure: (group, settings, rounds) to launches by setting and round. effect: what a setting does; settings with
    one effect are tried once."""
    best: Setting = {}
    trials: list[Trial] = []
    for group, candidates in groups.items():
        seen, offered = {effect(best)}, []
        for setting in (tidy(best | candidate) for candidate in candidates):
            if effect(setting) not in seen:
                offered.append(setting)
                seen.add(effect(setting))
        if not offered:
            continue
        tried = sweep(group, best, offered, rounds, measure)
        trials += tried
        winners = [t for t in tried if t.verdict.wins]
        best = max(winners, key=lambda t: t.verdict.ratio).setting if winners else best
    if best:
        defaults, launched = measure(CONFIRMATION, [{}, best], rounds)
        trials += trials_of(CONFIRMATION, defaults, {}, [best], [launched])
        best = best if trials[-1].verdict.wins else {}
    return Search(best, trials)


def tidy(setting: Setting) -> Setting:
    """Without keys that fusion makes meaningless."""
    idle = ("bucket_mb", "first_bucket_mb") if setting.get("reduction") == "fusion" else ()
    return {k: v for k, v in setting.items() if k not in idle}


def most_launches(groups: dict[str, list[Setting]], rounds: int) -> int:
    screening = min(SCREENING_ROUNDS, rounds)
    swept = [screening * (1 + len(c)) + (rounds - screening) * (1 + math.ceil(len(c) / 2)) for c in groups.values()]
    return sum(swept) + 2 * rounds


def said(setting: Setting) -> str:
    return ", ".join(f"{k} {v}" for k, v in setting.items()) or "default"
