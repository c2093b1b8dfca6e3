"""`bench checkpoint`: what a checkpoint holds the steps up, written at once and behind them.

For: the command line. One process, no engine's collectives: only one rank writes. Imports core, train and all below.
"""
