"""`bench loader`: images a second of our loader and its peers, in turn in one process.

The peers (torchvision, DALI's reader, FFCV) are loaded when they are built.

May be imported by: commands.
May import: core, report, data, recipe, arguments, progress, errors.
"""
