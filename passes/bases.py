"""The one free value of each class: units in which little has to change.

Where everybody who reads a class needs the same units, those: consumers keep their weights. Else
the middle of what is asked, as a power of 2, so that no product of many scales leaves the range.
Where nobody reads, the same for those who write.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnfold.passes.potentials import F64, Ids, Potentials
from bnfold.passes.shift_sums import solve_sums
from bnfold.passes.solution import Solution


@dataclass(frozen=True, slots=True, eq=False)
class ChannelUnits:
    """Units by channel: readers do ``v = scale u + shift``, writers ``u = into v + plus``."""

    scale: F64
    shift: F64
    into: F64
    plus: F64


def choose_units(solution: Solution) -> ChannelUnits:
    """A value for everything that ``solution`` leaves free."""
    reads, writes = _ends(solution)
    scale = _scales(solution, reads, writes)
    shift = _shifts(solution, reads)
    with np.errstate(all="ignore"):
        units = ChannelUnits(scale, shift, 1 / scale, -shift / scale)
    return _patched(solution, units)


def _ends(solution: Solution) -> tuple[Ids, Ids]:
    """The channels that linear operators, and steps that stay, read and write."""
    gone = {c.step for c in solution.vanished}
    sides = []
    for table in (solution.constraints.reads, solution.constraints.writes):
        kept = [numbers for index, numbers in table.items() if index not in gone]
        sides.append(np.concatenate(kept) if kept else np.zeros(0, np.int64))
    return sides[0], sides[1]


def _scales(solution: Solution, reads: Ids, writes: Ids) -> F64:
    classes = solution.scale
    chosen = np.ones(classes.root.size)
    undecided = np.ones(classes.root.size, bool)
    for numbers in (reads, writes):
        low, high = _extremes(classes, np.log2(np.abs(classes.slope)), numbers)
        here = undecided & np.isfinite(low)
        first = _first(classes, numbers)
        same = here & (low == high)
        chosen[same] = 1 / classes.slope[first[same]]
        apart = here & (low != high)
        chosen[apart] = 2.0 ** np.round(-(low[apart] + high[apart]) / 2)
        chosen[apart] *= np.sign(classes.slope[first[apart]])
        undecided &= ~here
    bound = solution.sign != 0
    chosen[bound] = np.abs(chosen[bound]) * solution.sign[bound]
    chosen[0] = 1.0
    return classes.slope * chosen[classes.root]


def _extremes(classes: Potentials, values: F64, numbers: Ids) -> tuple[F64, F64]:
    """By root, the least and the largest of ``values`` at ``numbers``; infinite where none is."""
    low = np.full(classes.root.size, np.inf)
    high = np.full(classes.root.size, -np.inf)
    np.minimum.at(low, classes.root[numbers], values[numbers])
    np.maximum.at(high, classes.root[numbers], values[numbers])
    return low, high


def _first(classes: Potentials, numbers: Ids) -> Ids:
    """By root, the first of ``numbers`` in its class."""
    first = np.zeros(classes.root.size, np.int64)
    first[classes.root[numbers[::-1]]] = numbers[::-1]
    return first


def _shifts(solution: Solution, reads: Ids) -> F64:
    classes = solution.shift
    last = np.zeros(classes.root.size, bool)
    last[classes.root[reads]] = True
    solved = solve_sums(solution.constraints.sums, classes, last)
    assert solved is not None, "a solution whose sums contradict each other was accepted"
    classes = solved.shift
    wanted = -classes.offset / classes.slope
    low, high = _extremes(classes, wanted, reads)
    chosen = np.zeros(classes.root.size)
    asked = np.isfinite(low)
    low, high = low[asked], high[asked]
    chosen[asked] = np.where(low == high, low, (low + high) / 2)
    chosen[0] = 0.0
    sums = solution.constraints.sums
    for aside in reversed(solved.aside):
        chosen = _supplied(classes, chosen, sums.numbers[aside.rows], sums.factors[aside.rows],
                           aside.unknown)  # fmt: skip
    result: F64 = classes.slope * chosen[classes.root] + classes.offset
    return result


def _supplied(classes: Potentials, chosen: F64, numbers: Ids, factors: F64, unknown: Ids) -> F64:
    """Give each ``unknown`` the value that its equation leaves for it."""
    roots = classes.root[unknown]
    safe = np.maximum(numbers, 0)
    factors = np.where(numbers >= 0, factors, 0.0)
    own = classes.root[safe] == roots[:, None]
    known = np.where(own, 0.0, chosen[classes.root[safe]])
    rest = (factors * (classes.slope[safe] * known + classes.offset[safe])).sum(axis=1)
    weight = np.where(own, factors * classes.slope[safe], 0.0).sum(axis=1)
    result = chosen.copy()
    result[roots] = -rest / weight
    return result


def _patched(solution: Solution, units: ChannelUnits) -> ChannelUnits:
    """Channels whose step can't be divided by: one side stores what the other side holds."""
    classes, everything = solution.scale.root, np.arange(solution.scale.root.size)
    order = sorted(solution.patches, key=lambda p: p.candidate.step)
    for patch in reversed(order):
        for at in patch.backward:
            x, y = patch.candidate.x[at], patch.candidate.y[at]
            a, b = patch.candidate.a[at], patch.candidate.b[at]
            same = everything[classes == classes[x]]
            into, plus = units.into[y] * a, units.into[y] * b + units.plus[y]
            units.into[same], units.plus[same] = into, plus
            units.scale[same], units.shift[same] = np.nan, np.nan  # nobody can read it back
    for patch in order:
        for at in patch.forward:
            x, y = patch.candidate.x[at], patch.candidate.y[at]
            a, b = patch.candidate.a[at], patch.candidate.b[at]
            same = everything[classes == classes[y]]
            units.scale[same] = a * units.scale[x]
            units.shift[same] = a * units.shift[x] + b
    return units
