"""Amendments: what a person changes in a run that is under way, as decisions of that step.

An amendment opens a segment of the schedule. Steps before it do not move, so that the run stays a function of (recipe,
decisions), and anyone can plan it again. amendments.json in the run folder holds them from before they take effect;
metrics.jsonl journals them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_lbsgd import recipe as recipes
from hpc_lbsgd import yaml12
from hpc_lbsgd.errors import RequestError
from hpc_lbsgd.recipe import Decision, Recipe
from hpc_lbsgd.theory.schedule import Schedule, Segments

AMENDABLE = (
    "optim.base_lr",
    "schedule.milestones",
    "schedule.factor",
    "schedule.max_batch",
    "train.epochs",
    "train.on_bad_step",
    "train.bad_steps_limit",
    "wire_scale_bits",
    "fixed_point_bits",
)

# These hold from the start of a process on; the others act through the schedule, at their step
AT_START = ("train.on_bad_step", "train.bad_steps_limit", "wire_scale_bits", "fixed_point_bits")

Amendment = list[Any]  # [step, {key: value}], as amendments.json has it


def parse(settings: list[str]) -> dict[str, Any]:
    """{key: value} of `--amend KEY=VALUE` words; refuses keys that may not change in mid-run."""
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key.strip() not in AMENDABLE:
            raise RequestError(f"--amend {setting}: expected KEY=VALUE with one of {', '.join(AMENDABLE)}")
        changes[key.strip()] = yaml12.parse(value, f"--amend {setting}")
    return changes


def of_request(settings: list[str], resume: str | None) -> dict[str, Any]:
    """The changes that a start asks for: only a resume has any."""
    if settings and not resume:
        raise RequestError(f"--amend {settings[0]}: only with --resume; a run that starts has its recipe, and --set")
    return parse(settings)


def amended(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with these keys changed, checked as a whole."""
    content = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    return recipes.validate(content, f"--amend {' '.join(f'{k}={v}' for k, v in changes.items())}")


def checked(amendments: object, where: str) -> list[Amendment]:
    """What a file holds as amendments; raises RequestError where `--amend` cannot have written it."""
    last = -1
    if not isinstance(amendments, list):
        raise RequestError(f"{where}: expected a list of [step, {{key: value}}]")
    for entry in amendments:
        match entry:
            case [int(step), dict(changes)] if step > last and not isinstance(step, bool):
                last = step
            case _:
                raise RequestError(f"{where}: {entry}: expected [step, {{key: value}}], by rising step")
        wrong = next((key for key in changes if key not in AMENDABLE), None)
        if wrong:
            raise RequestError(f"{where}: {wrong} at step {step} cannot be amended; allowed: {', '.join(AMENDABLE)}")
    return amendments


def added(
    recipe: Recipe, amendments: Sequence[Amendment], step: int, changes: dict[str, Any], decided: bool
) -> list[Amendment]:
    """The amendments with `changes` from `step` on, in place of what was amended of the same keys for later. What is in
    force already is left out: a batch script says the same at each of its starts. decided: an adaptive batch has
    decided on learning rates."""
    now = recipe
    for _, before in amendments:
        now = amended(now, before)
    old, new = (recipes.flatten(r.model_dump(mode="json")) for r in (now, amended(now, changes)))
    changes = {key: value for key, value in changes.items() if old[key] != new[key]}
    if not changes:
        return list(amendments)
    rates = [key for key in changes if key.startswith(("optim.", "schedule."))]
    if decided and rates:
        raise RequestError(
            f"--amend {rates[0]}: an adaptive batch has decided on batch and learning rate since, and goes on from "
            "those; start another run from the weights"
        )
    kept = [[s, c if s < step else {k: v for k, v in c.items() if k not in changes}] for s, c in amendments]
    here: dict[str, Any] = next((c for s, c in kept if s == step), {})
    others = [[s, c] for s, c in kept if s != step and c]
    return sorted([*others, [step, here | changes]], key=lambda amendment: amendment[0])


def said(step: int, changes: dict[str, Any]) -> str:
    """An amendment for a person."""
    return f"at step {step}: {', '.join(f'{key} = {value}' for key, value in changes.items())}"


def recipe_now(recipe: Recipe, amendments: Sequence[Amendment], step: int) -> Recipe:
    """The recipe of a process that goes on at `step`. Refuses where a later amendment would have to wait."""
    for amended_at, changes in amendments:
        late = [key for key in changes if key in AT_START]
        if amended_at > step and late:
            raise RequestError(
                f"the run goes back to step {step}, before {late[0]} was amended at step {amended_at}: take that out "
                f"of amendments.json, and say it again from here on (--amend {late[0]}={changes[late[0]]})"
            )
        recipe = amended(recipe, changes)
    return recipe


def schedule_of(
    recipe: Recipe, samples: int, decisions: Sequence[Decision] = (), amendments: Sequence[Amendment] = ()
) -> Schedule:
    """The run as a function of the step. Raises RequestError where an amendment would move steps before it."""
    schedule = recipe.build_schedule(samples, decisions)
    for step, changes in amendments:
        before, recipe = recipe, amended(recipe, changes)
        later = recipe.build_schedule(samples, decisions)
        try:
            if passed(before, schedule, step) != passed(recipe, later, step):
                raise ValueError("a milestone that the run has passed stays; change only those ahead")
            schedule = Segments(schedule, step, later)
        except ValueError as problem:
            named = ", ".join(f"{k} = {v}" for k, v in changes.items())
            raise RequestError(f"--amend: {named} at step {step}: {problem}") from None
    return schedule


def passed(recipe: Recipe, schedule: Schedule, step: int) -> list[int]:
    """The milestones at whose epoch a step was taken before `step`."""
    return [m for m in recipe.schedule.milestones if m < schedule.epochs and schedule.first_step(m) < step]
