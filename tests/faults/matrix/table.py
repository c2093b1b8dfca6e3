"""All rows, in the order in which they run: the cheap ones first."""

import bits
import deaths
import disks
import elastic
import fuzz
import images
import network
import owners
import slurm_lab
import stops
import unlike
import wrong

ROWS = [
    *bits.ROWS,
    *disks.ROWS,
    *deaths.ROWS,
    *wrong.ROWS,
    *unlike.ROWS,
    *owners.ROWS,
    *stops.ROWS,
    *images.ROWS,
    *network.ROWS,
    *fuzz.ROWS,
    *slurm_lab.ROWS,
    *elastic.ROWS,
]
