"""`bench rates`: parse, call, print. No logic."""

from __future__ import annotations

from hpc_lbsgd.arguments import add_command, positive, with_json, with_recipe
from hpc_lbsgd.bench.core.output import give
from hpc_lbsgd.errors import EXIT_DONE


def add(benches) -> None:
    p = add_command(
        benches,
        "rates",
        help="a recipe's step with synthetic batches, its loader alone, and both together",
        example="bench rates fashion-mnist --steps 50",
    )
    with_recipe(p)
    p.add_argument("--rounds", type=positive, default=5, help="measurements of each (default: %(default)s)")
    p.add_argument("--steps", type=positive, default=20, help="steps a measurement (default: %(default)s)")
    with_json(p).set_defaults(function=run)


def run(args) -> int:
    from hpc_lbsgd import recipe as recipes
    from hpc_lbsgd.bench.rates.run import rates
    from hpc_lbsgd.bench.rates.show import show

    result = rates(recipes.read(args.recipe, args.settings), args.rounds, args.steps)
    if result:  # on one rank
        give(result, show, args.json)
    return EXIT_DONE
