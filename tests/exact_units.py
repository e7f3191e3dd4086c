"""Which sets of steps can vanish together: the table of units, solved in rational arithmetic.

Written from the equations and not from the passes, to judge them. Every element (value, place)
has a scale s != 0 and a shift t. Scales form a union-find with signed rational ratios, shifts a
system of linear equations; both exact, so that there is no tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations, product

import numpy as np

from bnfold.channel_graph import (
    Affine,
    Anchor,
    Form,
    Linear,
    Link,
    Norm,
    Operator,
    Product,
    Route,
    ShiftRule,
    Sign,
    Sum,
    Tie,
    ValueId,
)
from tests.channel_graphs import Net

Element = tuple[ValueId, int]
TRUE: Element = (-1, 0)
ONE = Fraction(1)
ZERO = Fraction(0)


class ContradictionError(Exception):
    """No units satisfy all equations."""


@dataclass(slots=True)
class Units:
    """The equations met so far, in solved form."""

    parent: dict[Element, tuple[Element, Fraction]] = field(default_factory=dict)
    positive: set[Element] = field(default_factory=lambda: {TRUE})
    rows: dict[Element, tuple[dict[Element, Fraction], Fraction]] = field(default_factory=dict)

    def copy(self) -> Units:
        return Units(dict(self.parent), set(self.positive), dict(self.rows))

    # ---- scales ----

    def root(self, x: Element) -> tuple[Element, Fraction]:
        """The root of x's class, and s_x / s_root."""
        ratio = ONE
        while x in self.parent:
            x, step = self.parent[x]
            ratio *= step
        return x, ratio

    def scaled(self, x: Element, y: Element, a: Fraction = ONE) -> None:
        """``s_y = a * s_x``."""
        (rx, fx), (ry, fy) = self.root(x), self.root(y)
        if rx != ry:
            self.parent[ry] = (rx, a * fx / fy)
        elif fy != a * fx:
            raise ContradictionError

    def check_signs(self) -> None:
        """All positive members of a class have one sign relative to its root."""
        signs: dict[Element, bool] = {}
        for x in self.positive:
            root, ratio = self.root(x)
            if signs.setdefault(root, ratio > 0) != (ratio > 0):
                raise ContradictionError

    # ---- shifts ----

    def equation(self, terms: Iterable[tuple[Element, Fraction | int]], constant: Fraction) -> None:
        """``sum of factor * t = constant``."""
        row: dict[Element, Fraction] = {}
        for x, factor in terms:
            row[x] = row.get(x, ZERO) + factor
        row, constant = self._reduced(row, constant)
        if row:
            pivot = next(iter(row))
            factor = row.pop(pivot)
            self.rows[pivot] = ({x: -f / factor for x, f in row.items()}, constant / factor)
        elif constant:
            raise ContradictionError

    def _reduced(
        self, row: dict[Element, Fraction], constant: Fraction
    ) -> tuple[dict[Element, Fraction], Fraction]:
        """The row without elements that are solved for: t = sum of f * t' + c."""
        row = {x: f for x, f in row.items() if f}
        while pivot := next((x for x in row if x in self.rows), None):
            factor = row.pop(pivot)
            terms, known = self.rows[pivot]
            constant -= factor * known
            for x, f in terms.items():
                row[x] = row.get(x, ZERO) + factor * f
                if not row[x]:
                    del row[x]
        return row, constant

    def shifted(self, x: Element, y: Element, a: Fraction = ONE, b: Fraction = ZERO) -> None:
        """``t_y = a * t_x + b``."""
        self.equation([(y, ONE), (x, -a)], b)

    def unshifted(self, x: Element) -> None:
        """``t_x = 0``."""
        self.equation([(x, ONE)], ZERO)

    def true(self, x: Element) -> None:
        """``s_x = 1, t_x = 0``."""
        self.scaled(TRUE, x)
        self.unshifted(x)

    # ---- a solution ----

    def solution(self, x: Element) -> tuple[Fraction, Fraction]:
        """One possible (s, t): what is free is 1 or -1, and 0."""
        root, ratio = self.root(x)
        there, unit = self.root(TRUE)
        flip = any(r == root and f < 0 for r, f in map(self.root, self.positive))
        _, constant = self._reduced({x: ONE}, ZERO)
        return ratio / (unit if there == root else -ONE if flip else ONE), -constant


@dataclass(frozen=True, slots=True)
class Choice:
    """Steps that vanish, what is left to pay, and units that make it so."""

    folded: frozenset[int]
    left: int
    units: Units


def cheapest(net: Net) -> Choice:
    """The choice that leaves the smallest cost, by trying all from the best down."""
    bases = list(_bases(net))
    subsets = [s for n in range(len(net.steps) + 1) for s in combinations(net.steps, n)]
    total = sum(map(net.cost, net.steps))
    for subset in sorted(subsets, key=lambda s: -sum(map(net.cost, s))):
        folded = frozenset(subset)
        for base in bases:
            units = _with_steps(net, base.copy(), folded)
            if units is not None:
                return Choice(folded, total - sum(map(net.cost, subset)), units)
    raise AssertionError("nothing folded is always possible")


def _bases(net: Net) -> Iterator[Units]:
    """What holds whatever vanishes, once for each choice of gates."""
    products = [i for i, op in enumerate(net.graph.operators) if isinstance(op, Product)]
    for gates in product((0, 1), repeat=len(products)):
        units, chosen = Units(), dict(zip(products, gates, strict=True))
        try:
            for value in net.graph.anchors:
                _true(net, units, value)
            for index, operator in enumerate(net.graph.operators):
                _operator(net, units, operator, chosen.get(index, 0))
            units.check_signs()
        except ContradictionError:
            raise AssertionError("true units are always possible") from None
        yield units


def _with_steps(net: Net, units: Units, folded: frozenset[int]) -> Units | None:
    if _has_two_names(net, folded):
        return None
    try:
        for index, step in net.steps.items():
            _step(net, units, step, index in folded)
        units.check_signs()
    except ContradictionError:
        return None
    return units


def _has_two_names(net: Net, folded: frozenset[int]) -> bool:
    """Whether a tensor would be two inputs or outputs of the graph at once."""
    tensor = {value: value for value in range(len(net.graph.values))}
    for index in sorted(folded):
        step = net.steps[index]
        tensor[step.outputs[0]] = tensor[step.inputs[0]]
    named = [v for v, anchor in net.graph.anchors.items() if anchor is not Anchor.CAPTURED]
    return len({tensor[v] for v in named}) < len(named)


# ---- the table ----


def _operator(net: Net, units: Units, operator: Operator, gate: int) -> None:
    if isinstance(operator, Linear):
        _uniform(net, units, operator.inputs[0], operator.in_axis)
        _uniform(net, units, operator.outputs[0], operator.out_axis)
        for x in _elements(net, operator.inputs[0]) if operator.shift_barrier else ():
            units.unshifted(x)
    elif isinstance(operator, Norm):
        _true(net, units, operator.inputs[0])
        _uniform(net, units, operator.outputs[0], operator.axis)
    elif isinstance(operator, Tie):
        _tie(net, units, operator)
    elif isinstance(operator, Sum):
        _sum(net, units, operator)
    elif isinstance(operator, Product):
        _product(net, units, operator, gate)
    elif not isinstance(operator, Affine):
        for value in (*operator.inputs, *operator.outputs):
            _true(net, units, value)


def _tie(net: Net, units: Units, tie: Tie) -> None:
    reached: set[Element] = set()
    for route in tie.paths:
        for x, y in _same_scale(net, units, route):
            reached.add(y)
            if tie.sign is Sign.POSITIVE:
                units.positive |= {x, y}
            if tie.shift is ShiftRule.EQUAL:
                units.shifted(x, y)
    ends = {v for route in tie.paths for v in (route.source, route.target)}
    for value in (*tie.inputs, *tie.outputs):
        if value not in ends:
            _true(net, units, value)
        elif tie.shift is ShiftRule.ZERO:
            for x in _elements(net, value):
                units.unshifted(x)
    for value in tie.outputs:
        for y in set(_elements(net, value)) - reached:
            units.true(y)


def _sum(net: Net, units: Units, total: Sum) -> None:
    sources = [{y: x for x, y in _same_scale(net, units, route)} for route in total.paths]
    for y in _elements(net, total.outputs[0]):
        terms = [(s[y], -sign) for s, sign in zip(sources, total.signs, strict=True)]
        units.equation([(y, ONE), *terms], ZERO)


def _product(net: Net, units: Units, operator: Product, gate: int) -> None:
    _true(net, units, operator.routes[gate].source)
    carried = operator.routes[1 - gate]
    list(_same_scale(net, units, carried))
    for value in (carried.source, carried.target):
        for x in _elements(net, value):
            units.unshifted(x)


def _step(net: Net, units: Units, step: Affine, folded: bool) -> None:
    """Folded: (s, t)_out = (a, b) o (s, t)_in. Kept: a Mul stays a Mul, an Add stays an Add."""
    assert step.map is not None
    assert step.axis is not None
    x, y = step.inputs[0], step.outputs[0]
    if not folded:
        _uniform(net, units, x, step.axis)
        _uniform(net, units, y, step.axis)
    channel = np.indices(net.shapes[x])[step.axis].ravel()
    taken = step.map.expand(net.shapes[x][step.axis])
    for k, c in enumerate(channel):
        a, b = (Fraction(v[c]).limit_denominator(10**6) for v in (taken.scale, taken.shift))
        if folded:
            units.scaled((x, k), (y, k), a)
            units.shifted((x, k), (y, k), a, b)
        elif step.form is Form.EITHER and taken.is_shifting:
            units.scaled((x, k), (y, k))
        elif step.form is Form.EITHER:
            units.shifted((x, k), (y, k), a)


# ---- elements ----


def _elements(net: Net, value: ValueId) -> list[Element]:
    return [(value, k) for k in range(int(np.prod(net.shapes[value])))]


def _true(net: Net, units: Units, value: ValueId) -> None:
    for x in _elements(net, value):
        units.true(x)


def _uniform(net: Net, units: Units, value: ValueId, *axes: int) -> None:
    """The units vary along ``axes`` only."""
    shape = net.shapes[value]
    first: dict[tuple[int, ...], Element] = {}
    for k, place in enumerate(np.ndindex(shape)):
        x = first.setdefault(tuple(place[a] for a in axes), (value, k))
        if x != (value, k):
            units.scaled(x, (value, k))
            units.shifted(x, (value, k))


def _same_scale(net: Net, units: Units, route: Route) -> list[tuple[Element, Element]]:
    """Tie the scales along a route; returns the pairs of elements that it joins."""
    linked = route.links
    if linked is not None:
        _uniform(net, units, route.source, *(a for link in linked for a in link.source))
        _uniform(net, units, route.target, *(a for link in linked for a in link.target))
    pairs = _pairs(net, route)
    for x, y in pairs:
        units.scaled(x, y)
    return pairs


def _pairs(net: Net, route: Route) -> list[tuple[Element, Element]]:
    """One pair for each element of the target that the route reaches, and each of the source."""
    shapes = net.shapes[route.source], net.shapes[route.target]
    if route.links is None:
        return list(zip(_elements(net, route.source), _elements(net, route.target), strict=True))
    joined = []
    for (k, x), (j, y) in product(*(list(enumerate(np.ndindex(s))) for s in shapes)):
        if all(_meet(link, x, y, *shapes) for link in route.links):
            joined.append(((route.source, k), (route.target, j)))
    return joined


def _meet(
    link: Link, x: tuple[int, ...], y: tuple[int, ...], one: tuple[int, ...], two: tuple[int, ...]
) -> bool:
    """Whether a link joins place x of the source with place y of the target."""
    here = _entry(x, one, link.source)
    there = _entry(y, two, link.target)
    source = range(_count(one, link.source)) if link.source_index is None else link.source_index
    target = range(_count(two, link.target)) if link.target_index is None else link.target_index
    return (here, there) in set(zip(map(int, source), map(int, target), strict=True))


def _entry(place: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    index = 0
    for axis in axes:
        index = index * shape[axis] + place[axis]
    return index


def _count(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return int(np.prod([shape[axis] for axis in axes]))
