"""Tier A: the stored weights equal the correctly rounded float64 fold, bit for bit.

No inference is run. Beside the verdict stand hazards: what is not wrong, but makes a model fragile
in narrow types (channels of very different range, subnormals, values that are not finite).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfold.verify.judge import Verdict

# Beyond this ratio of the largest to the smallest channel, one scale per tensor loses 13 bits.
RANGE_RATIO = 1e4
SUBNORMAL_SHARE = 1e-3


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """Where a stored tensor first differs from the expected one.

    Attributes:
        tensor: Its name.
        index: Index of the first differing element; empty where type or shape differ.
        ulps: How many representable numbers lie between them; None where that means nothing.
        count: How many elements differ.
        message: The same, in one sentence.
    """

    tensor: str
    index: tuple[int, ...]
    ulps: int | None
    count: int
    message: str


@dataclass(frozen=True, slots=True)
class WeightVerdict:
    """What tier A says: a verdict, the tensors that differ, and hazards as notes."""

    verdict: Verdict
    message: str
    differences: tuple[WeightDifference, ...] = ()
    notes: tuple[str, ...] = ()
    compared: int = 0


def judge_weights(
    expected: Mapping[str, NDArray[Any]], candidate: Mapping[str, NDArray[Any]]
) -> WeightVerdict:
    """Compares the weights that a fold should have stored with those that it did.

    Args:
        expected: The correctly rounded folds by tensor name, in the type they are stored in.
        candidate: The folded model's weights by name; only the expected names are read.
    """
    if not expected:
        return WeightVerdict(Verdict.INCONCLUSIVE, "no weights to compare")
    differences: list[WeightDifference] = []
    notes: list[str] = []
    for name, wanted in expected.items():
        found = candidate.get(name)
        if found is None:
            differences.append(WeightDifference(name, (), None, wanted.size, f"'{name}' is gone"))
            continue
        difference = _difference(name, wanted, found)
        if difference is not None:
            differences.append(difference)
        notes.extend(hazards(name, found))
    count = len(expected)
    if differences:
        more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        return WeightVerdict(
            Verdict.FAIL, differences[0].message + more, tuple(differences), tuple(notes), count
        )
    return WeightVerdict(
        Verdict.PASS, f"{count} folded tensors are correctly rounded, bit for bit", (),
        tuple(notes), count,
    )  # fmt: skip


def _difference(name: str, wanted: NDArray[Any], found: NDArray[Any]) -> WeightDifference | None:
    if wanted.dtype != found.dtype or wanted.shape != found.shape:
        return WeightDifference(
            name, (), None, wanted.size,
            f"'{name}' is {found.dtype}{list(found.shape)}, not {wanted.dtype}{list(wanted.shape)}",
        )  # fmt: skip
    differ = np.atleast_1d(_bits(wanted) != _bits(found))
    if not differ.any():
        return None
    place = int(np.argmax(differ.ravel()))
    index = tuple(int(i) for i in np.unravel_index(place, wanted.shape)) if wanted.ndim else ()
    ulps = ulp_distance(wanted[index], found[index])
    far = "" if ulps is None else f", {ulps} ulp away"
    count = int(differ.sum())
    return WeightDifference(
        name, index, ulps, count,
        f"'{name}' holds {found[index]!s} at {list(index)}, not {wanted[index]!s}{far} "
        f"({count} of {differ.size} values differ)",
    )  # fmt: skip


def _bits(array: NDArray[Any]) -> NDArray[np.uint8] | NDArray[Any]:
    # Bit patterns, since NaN != NaN and -0.0 == 0.0 are not what is asked.
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def ulp_distance(one: Any, other: Any) -> int | None:
    """How many steps between representable floats; None of integers and what is not finite."""
    if not is_float(np.asarray(one).dtype):
        return None
    if not (np.isfinite(np.float64(one)) and np.isfinite(np.float64(other))):
        return None
    return abs(_rank(one) - _rank(other))


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type is one of floats; to numpy small integers look like bfloat16, as bytes."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _rank(value: Any) -> int:
    """The place of a float among all of its type, counted from zero."""
    scalar = np.asarray(value)
    size = scalar.dtype.itemsize
    bits = int(scalar.reshape(1).view(f"u{size}")[0])
    sign = 1 << (8 * size - 1)
    return bits if bits < sign else sign - bits


def hazards(name: str, weight: NDArray[Any]) -> Iterator[str]:
    """What is fragile about a stored weight, one sentence each.

    Args:
        name: The tensor's name.
        weight: The tensor; its first axis is taken for the channels where it has several.
    """
    if not is_float(weight.dtype) or not weight.size:
        return
    sizes = np.abs(weight).reshape(weight.shape[0] if weight.ndim else 1, -1)
    if not np.isfinite(sizes).all():
        yield f"'{name}' holds values that are not finite"
        return
    peaks = sizes.max(axis=1).astype(np.float64)
    peaks = peaks[peaks > 0]
    if weight.ndim > 1 and peaks.size and peaks.max() / peaks.min() > RANGE_RATIO:
        yield f"channels of '{name}' differ in range by a factor of {peaks.max() / peaks.min():.1g}"
    share = float(((sizes > 0) & (sizes < _smallest_normal(weight.dtype))).mean())
    if share > SUBNORMAL_SHARE:
        yield f"{100 * share:.1f} % of '{name}' is subnormal in {weight.dtype}"


def _smallest_normal(dtype: np.dtype[Any]) -> Any:
    # In the weight's own type, or a bfloat16 comparison would promote.
    return dtype.type(2.0**-126 if dtype.name == "bfloat16" else np.finfo(dtype).smallest_normal)
