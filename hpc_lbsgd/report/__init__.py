"""What runs and benchmarks wrote down, for people to look at.

facts.py       a run folder's records in the shape that the others want
curves.py      a report's figures; page.py, page.html: the page itself
study.py       a scaling study, as `bench scaling` left it
watch.py       a run as it goes
compare.py     two runs, to the last digit
commands.py    their command lines
figures.py     how benchmarks make their plots

May be imported by: bench, reproduce, plan, cluster, trained, cli.
May import: train, amend, recipe, arguments, owner, schedulers, tail, yaml12, records, theory, origin, errors.
"""
