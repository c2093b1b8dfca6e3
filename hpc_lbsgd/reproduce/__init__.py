"""A paper's table or figure on data you have.

experiments.py   which runs make a table, and what the paper measured. Pure
cells.py         one run of a table: its folder, whether it is finished, what came out
runner.py        runs the cells that are missing, several side by side
table.py         what came out, beside the paper: Markdown, JSON
plots.py         the same as a picture

May be imported by: cli.
May import: report, parallel, data, recipe, records, theory, progress, origin, urls, errors.
"""
