"""What a run left, put to use: evaluate it on any data, predict images, hand its model to others; take its
steps again.

opened.py      a run's model with the weights of one of its checkpoints
evaluate.py    loss and accuracy, as the run itself measures them
predict.py     classes of image files
export.py      the weights in other formats, each read back and compared
audit.py       steps on record, taken again
commands.py    their command lines

May be imported by: cli.
May import: report, train, parallel, data, amend, recipe, arguments, records, progress, urls, errors.
"""
