"""Which samples there are, who gets which, and how they become tensors.

order.py       the permutation of an epoch, and who gets which part of it. Pure
manifest.py    the list of a set's images and their fields; names.py: what a name may be.
               sound.py is what is relied on of a file of others. tree.py makes it from a folder, archive.py from
               tars, table.py from a table, pack.py into shards, which shards.py writes;
               fields.py, masks.py, boxes.py and files.py are what a sample has beside its image, beside.py finds it in
               tars, carried.py takes it into a pack, for whose images encode.py is;
               decode.py says what is an image, labels.py which class it has, verify.py what is wrong;
               find.py says which manifest is meant; parts.py lets the work go on, and be shared; columns.py looks up
               rows of any number
               show.py makes a picture of a set, as a model sees it
remote.py      shards that lie elsewhere, by ranges and ahead of time (foreseen.py): elsewhere.py says who is asked,
               http.py or fsspec, reach.py what may go wrong; kept.py keeps samples on the node
source.py      the seam: what a loader is asked for, and a Batch; orientation.py which way up, targets.py what the
               model and the loss get, encoders.py numbers of texts and bytes
loader.py      the choice of one; dali.py and torchvision.py decode, finish.py does the rest on CPUs, bounded.py asks
               for as much as memory may hold, place.py brings batches to a GPU
user.py        sets of a user's own; user_loader.py their batches, maker.py makes them in processes; own.py packs them

May be imported by: outline, train, bench, reproduce, here, plan, cluster, trained, first_recipe, api, cli.
May import: recipe, arguments, owner, records, signals, imports, theory, progress, private, urls, errors.
"""
