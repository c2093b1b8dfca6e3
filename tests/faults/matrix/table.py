"""All rows, in the order in which they run: the cheap ones first."""

import bits
import deaths

ROWS = [*bits.ROWS, *deaths.ROWS]
