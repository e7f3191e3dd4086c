"""The one free value of each class: units in which little has to change.

Where everybody who reads a class needs the same units, those: consumers keep their weights. Else
the middle of what is asked, as a power of 2, so that no product of many scales leaves the range.
Where nobody reads, the same for those who write.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnfold.passes.classes import Bond, Channels
from bnfold.passes.constraints import Sums
from bnfold.passes.potentials import F64, Ids, Potentials
from bnfold.passes.shift_sums import SetAside, solve_sums
from bnfold.passes.solution import Solution


@dataclass(frozen=True, slots=True, eq=False)
class ChannelUnits:
    """Units by channel: readers do ``v = scale u + shift``, writers ``u = into v + plus``."""

    scale: F64
    shift: F64
    into: F64
    plus: F64


def choose_units(channels: Channels, solution: Solution) -> ChannelUnits:
    """A value for everything that ``solution`` leaves free."""
    reads, writes = _ends(channels, solution)
    scale = _scales(solution, channels.scale[reads], channels.scale[writes])[channels.scale]
    shift = _shifts(channels, solution, reads)
    with np.errstate(all="ignore"):
        units = ChannelUnits(scale, shift, 1 / scale, -shift / scale)
    return _patched(channels, solution, units)


def _ends(channels: Channels, solution: Solution) -> tuple[Ids, Ids]:
    """The channels that linear operators, and steps that stay, read and write."""
    gone = {bond.candidate.step for bond in solution.vanished}
    sides = []
    for table in (channels.constraints.reads, channels.constraints.writes):
        kept = [numbers for index, numbers in table.items() if index not in gone]
        sides.append(np.concatenate(kept) if kept else np.zeros(0, np.int64))
    return sides[0], sides[1]


def _scales(solution: Solution, reads: Ids, writes: Ids) -> F64:
    """The scale of each class; ``reads`` and ``writes`` are classes too."""
    classes = solution.scale
    chosen = np.ones(classes.root.size)
    undecided = np.ones(classes.root.size, bool)
    for numbers in (reads, writes):
        low, high = _extremes(classes.root[numbers], np.log2(np.abs(classes.slope[numbers])),
                              classes.root.size)  # fmt: skip
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


def _extremes(roots: Ids, values: F64, count: int) -> tuple[F64, F64]:
    """By root, the least and the largest of its ``values``; infinite where it has none."""
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, roots, values)
    np.maximum.at(high, roots, values)
    return low, high


def _first(classes: Potentials, numbers: Ids) -> Ids:
    """By root, the first of ``numbers`` in its class."""
    first = np.zeros(classes.root.size, np.int64)
    first[classes.root[numbers[::-1]]] = numbers[::-1]
    return first


def _shifts(channels: Channels, solution: Solution, reads: Ids) -> F64:
    """The shift of each channel; ``reads`` are channels."""
    read = channels.shift[reads]
    last = np.zeros(solution.shift.root.size, bool)
    last[solution.shift.root[read]] = True
    sums = solution.classes.sums
    solved = solve_sums(sums, solution.shift, last)
    assert solved is not None, "a solution whose sums contradict each other was accepted"
    classes = solved.shift
    # slope (k x + m) + offset = 0 where the shift of a class is k x + m
    within = (channels.slope * classes.offset[channels.shift] + channels.offset)[reads]
    wanted = -within / (channels.slope[reads] * classes.slope[read])
    low, high = _extremes(classes.root[read], wanted, last.size)
    chosen = np.zeros(last.size)
    asked = np.isfinite(low)
    low, high = low[asked], high[asked]
    chosen[asked] = np.where(low == high, low, (low + high) / 2)
    chosen[0] = 0.0
    for aside in reversed(solved.aside):
        chosen = _supplied(classes, chosen, sums, aside)
    values = classes.slope * chosen[classes.root] + classes.offset
    result: F64 = channels.slope * values[channels.shift] + channels.offset
    return result


def _supplied(classes: Potentials, chosen: F64, sums: Sums, aside: SetAside) -> F64:
    """Give each unknown that was set aside the value that its equation leaves for it."""
    numbers, factors = sums.numbers[aside.rows], sums.factors[aside.rows]
    roots = classes.root[aside.unknown]
    safe = np.maximum(numbers, 0)
    factors = np.where(numbers >= 0, factors, 0.0)
    own = classes.root[safe] == roots[:, None]
    known = np.where(own, 0.0, chosen[classes.root[safe]])
    rest = (factors * (classes.slope[safe] * known + classes.offset[safe])).sum(axis=1)
    weight = np.where(own, factors * classes.slope[safe], 0.0).sum(axis=1)
    result = chosen.copy()
    result[roots] = -(rest + sums.constant[aside.rows]) / weight
    return result


def _patched(channels: Channels, solution: Solution, units: ChannelUnits) -> ChannelUnits:
    """Channels whose step can't be divided by: one side stores what the other side holds."""
    if not solution.patches:
        return units
    order = np.argsort(channels.scale, kind="stable")
    starts = np.searchsorted(channels.scale[order], np.arange(solution.classes.scales + 1))
    steps = sorted(solution.patches, key=lambda patch: patch.bond.candidate.step)
    for patch in reversed(steps):
        for at in patch.backward:
            _, y, a, b = _entry(patch.bond, at)
            same = order[starts[patch.bond.x[at]] : starts[patch.bond.x[at] + 1]]
            units.into[same] = units.into[y] * a
            units.plus[same] = units.into[y] * b + units.plus[y]
            units.scale[same] = units.shift[same] = np.nan  # nobody can read it back
    for patch in steps:
        for at in patch.forward:
            x, _, a, b = _entry(patch.bond, at)
            same = order[starts[patch.bond.y[at]] : starts[patch.bond.y[at] + 1]]
            units.scale[same] = a * units.scale[x]
            units.shift[same] = a * units.shift[x] + b
    return units


def _entry(bond: Bond, at: int) -> tuple[int, int, float, float]:
    """The channels before and after a step on its awkward channel ``at``, and its map there."""
    step, entry = bond.candidate, bond.awkward[at]
    return int(step.x[entry]), int(step.y[entry]), float(step.a[entry]), float(step.b[entry])
