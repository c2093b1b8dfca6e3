"""Amendments: what a person changes in a run that is under way, as decisions of that step.

An amendment opens a segment of the schedule. Steps before it do not move, so that the run stays a function of (recipe,
decisions), and anyone can plan it again. Kept in the checkpoint, journaled in metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence

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

Amendment = Sequence  # [step, {key: value}], as a checkpoint keeps it


def parse(settings: list[str]) -> dict:
    """{key: value} of `--amend KEY=VALUE` words; refuses keys that may not change in mid-run."""
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key.strip() not in AMENDABLE:
            raise RequestError(f"--amend {setting}: expected KEY=VALUE with one of {', '.join(AMENDABLE)}")
        changes[key.strip()] = yaml12.parse(value, f"--amend {setting}")
    return changes


def of_request(settings: list[str], resume: str | None) -> dict:
    """The changes that a start asks for: only a resume has any."""
    if settings and not resume:
        raise RequestError(f"--amend {settings[0]}: only with --resume; a run that starts has its recipe, and --set")
    return parse(settings)


def amended(recipe: Recipe, changes: dict) -> Recipe:
    """The recipe with these keys changed, checked as a whole."""
    content = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[last] = value
    return recipes.validate(content, f"--amend {' '.join(f'{k}={v}' for k, v in changes.items())}")


def recipe_now(recipe: Recipe, amendments: Sequence[Amendment]) -> Recipe:
    """The recipe after all amendments."""
    for _, changes in amendments:
        recipe = amended(recipe, changes)
    return recipe


def schedule_of(
    recipe: Recipe, samples: int, decisions: Sequence[Decision] = (), amendments: Sequence[Amendment] = ()
) -> Schedule:
    """The run as a function of the step. Raises RequestError where an amendment would move steps before it."""
    schedule = recipe.build_schedule(samples, decisions)
    for step, changes in amendments:
        recipe = amended(recipe, changes)
        later = recipe.build_schedule(samples, decisions)
        try:
            schedule = Segments(schedule, step, later)
        except ValueError as problem:
            named = ", ".join(f"{k} = {v}" for k, v in changes.items())
            raise RequestError(f"--amend: {named} at step {step}: {problem}") from None
    return schedule
