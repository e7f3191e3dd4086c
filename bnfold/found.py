"""What a front end found, before its values are numbered; where a constant lies beside a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from bnfold.affine import AffineMap
from bnfold.channel_graph import Bias, Dim, Form, Taps

Site = TypeVar("Site")


@dataclass(frozen=True, slots=True)
class FoundStep(Generic[Site]):
    """An affine step; see `bnfold.channel_graph.Affine`."""

    site: Site
    axis: int | None
    map: AffineMap | None
    form: Form
    training_mode: bool = False
    unproved: str = ""


@dataclass(frozen=True, slots=True)
class FoundLinear(Generic[Site]):
    """A linear operator; see `bnfold.channel_graph.Linear`."""

    site: Site
    in_axis: int
    out_axis: int
    shift_barrier: str
    bias: Bias
    taps: tuple[Taps, ...] | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A constant lies along ``axis`` (None: it is one number), before ``trailing`` others."""

    axis: int | None
    trailing: int
    unproved: str = ""


RANK_UNKNOWN = "the rank of its input is unknown"


def placed(shape: tuple[Dim, ...] | None, constant: tuple[int, ...]) -> Placed | None:
    """On which axis of a tensor a constant lies; None when the result has another shape.

    Args:
        shape: Of the tensor; None when its rank is unknown.
        constant: The shape of the constant, of which at most one size is not 1.
    """
    if shape is not None and len(constant) > len(shape):
        return None  # the constant raises the rank
    if all(size == 1 for size in constant):
        unproved = RANK_UNKNOWN if shape is None and constant else ""
        return Placed(None, 0, unproved)
    at = next(i for i, size in enumerate(constant) if size != 1)
    trailing = len(constant) - at - 1
    if shape is None:
        return Placed(-1 - trailing, trailing, RANK_UNKNOWN)
    return lying(shape, len(shape) - 1 - trailing, constant[at])


def lying(shape: tuple[Dim, ...], axis: int, size: int) -> Placed | None:
    """A constant of ``size`` numbers along ``axis``; None when it enlarges what it meets."""
    met = shape[axis]
    if met == 1 or (isinstance(met, int) and met != size):
        return None
    unproved = "" if isinstance(met, int) else f"the size of axis {axis} of its input is unknown"
    return Placed(axis, len(shape) - 1 - axis, unproved)
