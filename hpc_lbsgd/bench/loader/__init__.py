"""`bench loader`: images a second of our loader and its peers, in turn in one process.

For: the command line. Imports core, data, recipe and report; the peers (torchvision, DALI's reader, FFCV) when they are
built.
"""
