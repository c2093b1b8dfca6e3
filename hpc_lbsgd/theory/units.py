"""Units of int32 sums: small enough to keep digits, and a test that no sum can have wrapped. Pure.

S of a tensor and a step is the sum over workers of each one's largest |gradient|, in the unit 2^-exponent, rounded up
for every worker. No sum over any of the workers is larger, whatever the signs, rounded values included: so S <= LARGEST
excludes that int32 wraps, on a rank or between ranks. Whole numbers add up to one S in any order.
"""

from __future__ import annotations

LARGEST = 2**31 - 1
HEADROOM_BITS = 6  # that S may grow by from one step to the next
EXPONENTS = range(-100, 101)  # float32's values times 2^100, and their largest element as float64, stay finite


def fits(bound: int, exponent: int) -> bool:
    """Whether int32 holds all sums of a tensor with this S, and float32 their values in units of 2^-exponent."""
    return bound <= LARGEST and bound.bit_length() - exponent < 128


def next_exponent(bound: int, exponent: int) -> int:
    """The exponent for the next step, from this step's S and the exponent that S is in units of. A gradient of zero
    says nothing, and leaves it."""
    if bound == 0:
        return exponent
    finer = 31 - HEADROOM_BITS - (bound - 1).bit_length()  # S <= 2^bit_length
    return min(max(exponent + finer, EXPONENTS[0]), EXPONENTS[-1])
