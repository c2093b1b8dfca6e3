"""The papers' mathematics: scaling, schedule, noise scale, trade-off, costs of collectives, the simulated step,
units of int32 sums. Pure functions of numbers: no file, no rank, no tensor. numpy and the standard library alone.

May be imported by: own_schedule, recipe, amend, outline, parallel, data, train, bench, reproduce, plan, cluster, api.
May import: nothing.
"""
