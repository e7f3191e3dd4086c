"""The float types that can be scaled, and how much may happen to numbers stored in each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NumberType:
    """What a type can take.

    Attributes:
        nbytes: The size of one number.
        tiny: Below this share of a step's shift, dividing by its scale leaves too few digits of
            what the shift was added to. A scale alone may be undone whatever its size: that
            loses no digits.
        spread: How far, in powers of 2, the scales of one class may lie apart. A weight that leads
            from one end of it to the other is multiplied by as much.
        largest_shift: Beyond this a shift is larger than what it is added to by more digits than
            may be lost.
    """

    nbytes: int
    tiny: float
    spread: float
    largest_shift: float


NUMBER_TYPES = {
    "DOUBLE": NumberType(8, 2.0**-20, 512.0, 2.0**22),
    "FLOAT": NumberType(4, 2.0**-8, 64.0, 2.0**12),
    "FLOAT16": NumberType(2, 2.0**-4, 8.0, 2.0**6),
    "BFLOAT16": NumberType(2, 2.0**-3, 64.0, 2.0**5),
}
_UNKNOWN = NumberType(4, 2.0**-4, 8.0, 2.0**6)


def number_type(dtype: str) -> NumberType:
    """The type called ``dtype``; with narrow limits where it is not known."""
    return NUMBER_TYPES.get(dtype, _UNKNOWN)
