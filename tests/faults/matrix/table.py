"""All rows, in the order in which they run: the cheap ones first."""

import bits
import deaths
import elastic
import fuzz
import unlike
import wrong

ROWS = [*bits.ROWS, *deaths.ROWS, *wrong.ROWS, *unlike.ROWS, *elastic.ROWS, *fuzz.ROWS]
