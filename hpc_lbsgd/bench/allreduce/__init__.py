"""`bench allreduce`: what a sum over ranks costs here, by size and by who does it.

collectives.py runs the algorithms of theory/allreduce.py over mpi4py; choices.py writes the fastest of Open MPI's as
a file for a site.

May be imported by: commands.
May import: core, report, train, parallel, recipe, arguments, theory, errors.
"""
