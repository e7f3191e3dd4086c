"""A tensor of the candidate beside the one of the reference that it may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfold.verify.bounds import F64
from bnfold.verify.expected import Held
from bnfold.verify.judge import Verdict
from bnfold.verify.lockstep import floats, relative
from bnfold.verify.result import SiteResult

# So near it is the same value in the same units.
NEAR = 0.25
# A channel this much smaller than the largest says nothing about the others.
ALIVE = 2.0**-10


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A tensor of the reference, and how one of the candidate agrees with it.

    Attributes:
        held: Which tensor of the reference.
        true: What the candidate's should be.
        site: What is said of it; None where there is nothing to measure.
        agreeing: The share of channels that agree.
        weighted: Whether a weight is behind it.
    """

    held: Held
    true: Any
    site: SiteResult | None = None
    agreeing: float = 1.0
    weighted: bool = False

    @property
    def wrong(self) -> bool:
        """Whether it does not agree."""
        return self.site is not None and self.site.verdict is Verdict.FAIL

    @property
    def error(self) -> float:
        """How far off it is, relative to its size."""
        return 0.0 if self.site is None else self.site.error


def alike(true: Any, value: Any) -> bool:
    """Whether both are arrays of one shape and kind, so that they can be compared."""
    if not isinstance(true, np.ndarray) or not isinstance(value, np.ndarray):
        return False
    return bool(true.shape == value.shape and true.dtype.kind == value.dtype.kind)


def distance(value: Any, true: Any) -> float:
    """How far an array is off, relative to its size; whole numbers are right or wrong."""
    if floats(true) is None:
        return 0.0 if np.array_equal(value, true) else np.inf
    _, clean, apart = told_apart(value, true)
    return relative(apart, float(np.linalg.norm(clean)))


def share_agreeing(ratios: F64, sizes: F64) -> float:
    """The share of channels that agree, of those that are not next to nothing.

    Args:
        ratios: How far each channel is off, over what is allowed.
        sizes: The norm of each channel.
    """
    alive = sizes > ALIVE * sizes.max(initial=0.0)
    return float((ratios[alive] <= 1.0).mean()) if alive.any() else 0.0


def told_apart(value: F64, true: F64) -> tuple[F64, F64, F64]:
    """The candidate's, the reference's, zero where that is not known, and their difference."""
    told = np.isfinite(true)
    if told.all():
        return value, true, value - true
    value, clean = np.where(told, value, 0.0), np.where(told, true, 0.0)
    return value, clean, value - clean
