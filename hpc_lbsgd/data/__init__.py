"""Which samples there are, who gets which, and how they become tensors.

order.py       the permutation of an epoch, and who gets which part of it. Pure
manifest.py    the list of a set's images; archive.py of tars, pack.py and verify.py on top
source.py      the seam: what a loader is asked for, and a Batch
loader.py      the choice of one; dali.py and torchvision.py decode, finish.py does the rest on CPUs

May be imported by: outline, train, bench, reproduce, plan, cluster, cli.
May import: recipe, records, arguments, imports, theory, errors.
"""
