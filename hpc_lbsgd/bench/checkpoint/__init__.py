"""`bench checkpoint`: what a checkpoint holds the steps up, written at once and behind them.

One process, no sums: only one rank writes.

May be imported by: commands.
May import: core, train, parallel, recipe, arguments, records, signals, progress, errors.
"""
