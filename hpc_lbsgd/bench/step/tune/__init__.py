"""`bench step --tune`: one search over the machine keys of the gradient path, for a file that recipes include.

search.py is the search, pure; run.py launches step/measure.py for it; show.py writes the table and the file.

May be imported by: command.
May import: run, core, train, parallel, recipe, schedulers, yaml12, errors.
"""
