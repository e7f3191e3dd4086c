"""What every operator asks of the units of the values around it, as equations on channels.

    linear operator    nothing of its output; of its input nothing, or shift = 0 where it pads;
                       one scale for all channels of a side that its integers have no scales for
    tie                scale equal, positive for Relu and its kin; shift equal, or 0
    sum                scale equal; one equation between the shifts
    product            one factor in true units; scale equal along the other one; shift 0
    anything else      true units: scale = 1, shift = 0

A step that may vanish asks nothing if it can express a scale and a shift at once. One that can't
stays what it is: a scale keeps shift_out = a shift_in, a shift keeps scale_out = scale_in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import (
    Affine,
    Bias,
    Form,
    Linear,
    Norm,
    Product,
    Route,
    ShiftRule,
    Side,
    Sign,
    Sum,
    Tie,
    ValueId,
)
from bnfold.passes.draft import Draft
from bnfold.passes.guards import Refusal, anchored, shared, unusable, varying
from bnfold.passes.number_types import number_type
from bnfold.passes.numbering import Numbering, Pairs
from bnfold.passes.potentials import F64, EdgeList, Ids, Mask, Potentials
from bnfold.planning import Absorption, Reason


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A step that may vanish: ``s_y = a s_x`` and ``t_y = a t_x + b`` on every channel.

    ``cost`` is the size of its output in bytes; ``awkward`` are channels on which ``a`` is 0, or so
    small beside ``b`` that nothing may be divided by it.
    """

    step: int
    x: Ids
    y: Ids
    a: F64
    b: F64
    cost: int
    awkward: Mask


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Equations ``sum of factors * t[numbers] + constant = 0``, one a row; number -1 is none."""

    numbers: Ids
    factors: F64
    constant: F64
    owner: Ids


@dataclass(slots=True)
class _Parts:
    scale: EdgeList = field(default_factory=EdgeList)
    shift: EdgeList = field(default_factory=EdgeList)
    positive: list[tuple[Ids, int]] = field(default_factory=list)
    stiff: list[Ids] = field(default_factory=list)
    sums: list[tuple[list[Ids], list[int], int]] = field(default_factory=list)


class Constraints:
    """All that has to hold, whatever vanishes.

    Args:
        draft: The graph, with what is decided so far.
        barred: Operators that may not gain an Add for their bias.
        rigid: Steps that have to stay as they are.
        held: Steps that have to stay, and can take over units.
        narrowed: Steps next to which units have to be such that they could take them over.
        cloned: Weights, by storage, that each of their readers may have for itself.
    """

    def __init__(
        self,
        draft: Draft,
        *,
        barred: Container[int] = frozenset(),
        rigid: Container[int] = frozenset(),
        held: Container[int] = frozenset(),
        narrowed: Container[int] = frozenset(),
        cloned: frozenset[str] = frozenset(),
    ) -> None:
        self.draft = draft
        self._barred, self._rigid, self._held, self._cloned = barred, rigid, held, cloned
        self.numbering = Numbering(draft)
        self.candidates: list[Candidate] = []
        self.scale_fences: list[tuple[Ids, Refusal]] = []
        self.shift_fences: list[tuple[Ids, Refusal]] = []
        self.reads: dict[int, Ids] = {}
        self.writes: dict[int, Ids] = {}
        self.bare: list[int] = []
        self.agreeing: set[int] = set()
        self.uneven: dict[int, Side] = {}
        self.fills: dict[int, Ids] = {}
        self.narrow: list[int] = []
        self._narrowed = narrowed
        self._parts = _Parts()
        self._products: list[int] = []
        self._shared: dict[str, list[int]] = defaultdict(list)
        for index in sorted(self.numbering.operators):
            self._operator(index)
        for value in self.numbering.values:
            self._outside(value)
        for readers in self._shared.values():
            self._agree(readers)
        self._choose_gates()
        self.scale = self._parts.scale.edges()
        self.shift = self._parts.shift.edges()
        self.positive = self._parts.positive
        self.stiff = np.concatenate(self._parts.stiff) if self._parts.stiff else _none()
        self.sums = _as_rows(self._parts.sums)

    def bytes_of(self, value: ValueId) -> int:
        """The size of a value, with 1 for what is not known."""
        return bytes_of(self.draft, value)

    def sides(self, index: int) -> tuple[int | None, Ids, Ids]:
        """The axis on which step ``index`` can take over units, and its channels there."""
        axis = self.own_axis(index)
        x, y = self.draft.input(index), self.draft.output(index)
        if axis is None:
            return None, self.numbering.of(x).ravel()[:1], self.numbering.of(y).ravel()[:1]
        return axis, self.numbering.along(x, axis), self.numbering.along(y, axis)

    # ---- by kind of operator ----

    def _operator(self, index: int) -> None:
        operator = self.draft.operator(index)
        if isinstance(operator, Linear):
            self._linear(index, operator)
        elif isinstance(operator, Affine):
            self._step(index, operator)
        elif isinstance(operator, Tie):
            self._tie(index, operator)
        elif isinstance(operator, Sum):
            self._sum(index, operator)
        elif isinstance(operator, Product):
            self._products.append(index)
        elif isinstance(operator, Norm):
            self._norm(index, operator)
        else:
            fence = Refusal(Reason.NO_LINEAR_NEIGHBOUR, (operator.name,))
            self._fence_all(index, fence)

    def _linear(self, index: int, linear: Linear) -> None:
        fence = unusable(linear.weight, linear.name)
        if fence is not None:
            self._fence_all(index, fence)
            return
        data, output = self.draft.input(index), self.draft.output(index)
        for value in self.draft.inputs(index)[1:]:
            self._fence(value, Refusal(Reason.BIAS_NOT_CONSTANT, (linear.name,)))
        if data in self.numbering.values and self.draft.inputs(index).count(data) == 1:
            self._reads(index, linear, data)
        if output in self.numbering.values:
            self._writes(index, linear, output)
        assert linear.weight is not None
        if len(linear.weight.readers) > 1 and linear.weight.storage not in self._cloned:
            self._shared[linear.weight.storage].append(index)
        if linear.bias is Bias.NOWHERE:
            fence = Refusal(Reason.EXTRA_OPERATOR, (linear.name,))
            self._fence_shift(data, fence)
            self._fence_shift(output, fence)
        elif linear.bias is Bias.OPERATOR and not self.draft.has_bias(index):
            self.bare.append(index)
            if index in self._barred:
                fence = Refusal(Reason.EXTRA_OPERATOR, (linear.name,))
                self._fence_shift(data, fence)
                self._fence_shift(output, fence)

    def _reads(self, index: int, linear: Linear, data: ValueId) -> None:
        if not self._on_axis(index, data, linear.in_axis, linear.in_channels, linear.name):
            return
        self.reads[index] = self.numbering.along(data, linear.in_axis)
        self._one_scale(index, linear, Side.INPUT, self.reads[index])
        if linear.shift_barrier:
            fence = Refusal(Reason.ZERO_PADDING, (linear.name,), linear.shift_barrier)
            self._fence_shift(data, fence)
        elif linear.bias is Bias.DYNAMIC:
            self._fence_shift(data, Refusal(Reason.BIAS_NOT_CONSTANT, (linear.name,)))

    def _writes(self, index: int, linear: Linear, output: ValueId) -> None:
        if linear.bias is Bias.DYNAMIC:
            self._fence(output, Refusal(Reason.BIAS_NOT_CONSTANT, (linear.name,)))
        elif self._on_axis(index, output, linear.out_axis, linear.out_channels, linear.name):
            self.writes[index] = self.numbering.along(output, linear.out_axis)
            self._one_scale(index, linear, Side.OUTPUT, self.writes[index])

    def _one_scale(self, index: int, linear: Linear, side: Side, numbers: Ids) -> None:
        """All channels on ``side`` have one scale, if the weight can hold no other."""
        if side in self._varying(index, linear) or numbers.size < 2:
            return
        self.uneven[index] = self.uneven.get(index, Side.NONE) | side
        self._parts.scale.add(np.full_like(numbers[1:], numbers[0]), numbers[1:], index)

    def _varying(self, index: int, linear: Linear) -> Side:
        """The sides along whose channels what a weight is multiplied by may still vary.

        Of two that exclude each other: the one along which it does, else the one that writes what
        steps can reach.
        """
        assert linear.weight is not None
        taken = self.draft.absorptions.get(index, Absorption())
        asked = varying(taken.input, Side.INPUT) | varying(taken.output, Side.OUTPUT)
        fit = [sides for sides in linear.weight.varies if asked in sides]
        written = self.draft.output(index) in self.numbering.values
        side = Side.OUTPUT if written else Side.INPUT
        return next((sides for sides in fit if side in sides), fit[0] if fit else Side.NONE)

    def _norm(self, index: int, norm: Norm) -> None:
        output = self.draft.output(index)
        for value in self.draft.inputs(index):
            self._fence(value, Refusal(Reason.NO_LINEAR_NEIGHBOUR, (norm.name,)))
        fence = unusable(norm.weight, norm.name)
        if norm.bias is Bias.DYNAMIC:
            fence = Refusal(Reason.BIAS_NOT_CONSTANT, (norm.name,))
        elif norm.weight is not None and len(norm.weight.readers) > 1:
            fence = shared(norm.weight, norm.name)
        if fence is not None:
            self._fence(output, fence)
            return
        if output not in self.numbering.values:
            return
        if norm.bias in (Bias.OPERATOR, Bias.NOWHERE):
            self._fence_shift(output, Refusal(Reason.EXTRA_OPERATOR, (norm.name,)))
        if self._on_axis(index, output, norm.axis, norm.channels, norm.name):
            self.writes[index] = self.numbering.along(output, norm.axis)

    def _step(self, index: int, step: Affine) -> None:
        x, y = self.draft.input(index), self.draft.output(index)
        if step.stays and self._is_scale(step, x, y):
            fixed = self._candidate(index, step, step.map or AffineMap.identity())
            self._parts.scale.add(fixed.x, fixed.y, index)
            self._parts.shift.add(fixed.x, fixed.y, index, fixed.a)
            self._parts.stiff.append(fixed.y)
            return
        if not self.draft.is_open(index) or index in self._rigid:
            self._fence_all(index, Refusal(Reason.NO_LINEAR_NEIGHBOUR, (step.name,)))
            return
        taken = self.draft.step_map(index)
        sizes = self.numbering.sizes
        numbered = taken.channels == 1 or step.axis in self.numbering.axes[x]
        if not taken.finite or not numbered or sizes[x] != sizes[y]:
            self._fence_all(index, Refusal(Reason.NO_LINEAR_NEIGHBOUR, (step.name,)))
            return
        if index in self._narrowed:
            for value in (x, y):
                self._tie_beside(value, self.own_axis(index), index)
        candidate = self._candidate(index, step, taken)
        if index not in self._held:
            self.candidates.append(candidate)
        self.reads[index], self.writes[index] = candidate.x, candidate.y
        if step.form is Form.EITHER:
            self.narrow.append(index)
            self._stays_what_it_is(index, candidate, taken)

    def _is_scale(self, step: Affine, x: ValueId, y: ValueId) -> bool:
        """Whether a step multiplies by constants, none of them 0, channel by channel."""
        if step.map is None or step.training_mode or step.unproved or not step.map.finite:
            return False
        numbered = step.map.channels == 1 or step.axis in self.numbering.axes[x]
        alike = numbered and self.numbering.sizes[x] == self.numbering.sizes[y]
        return alike and step.map.is_scaling and bool(step.map.scale.all())

    def own_axis(self, index: int) -> int | None:
        """The one axis along which the units next to a step may vary, so that it can take them."""
        step, x = self.draft.operator(index), self.draft.input(index)
        assert isinstance(step, Affine)
        axes = self.numbering.axes[x]
        ranked = self.draft.values[x].shape is not None
        if step.axis is None and step.form is Form.EITHER and len(axes) == 1 and ranked:
            return axes[0]
        return step.axis

    def _candidate(self, index: int, step: Affine, taken: AffineMap) -> Candidate:
        x, y = self.draft.input(index), self.draft.output(index)
        sizes, axes = self.numbering.sizes[x], self.numbering.axes[x]
        shape = [1] * len(sizes)
        if taken.channels > 1 and step.axis is not None:
            shape[axes.index(step.axis)] = taken.channels
        scale, shift = (
            np.broadcast_to(v.reshape(shape), sizes).ravel() for v in (taken.scale, taken.shift)
        )
        tiny = number_type(self.draft.values[y].dtype).tiny * np.abs(shift)
        return Candidate(
            index, self.numbering.of(x).ravel(), self.numbering.of(y).ravel(), scale, shift,
            bytes_of(self.draft, y), ~(np.abs(scale) > tiny),
        )  # fmt: skip

    def _stays_what_it_is(self, index: int, candidate: Candidate, taken: AffineMap) -> None:
        x, y, a = candidate.x, candidate.y, candidate.a
        if taken.is_shifting:
            self._parts.scale.add(x, y, index)
            return
        live = a != 0
        self._parts.shift.add(x[live], y[live], index, a[live])
        self._parts.shift.add(np.zeros_like(y[~live]), y[~live], index)

    def _tie(self, index: int, tie: Tie) -> None:
        name = tie.name
        if tie.fill is not None and self._filled(index):
            self.fills[index] = self.numbering.of(self.draft.output(index)).ravel()
            tie = replace(tie, shift=ShiftRule.EQUAL, fill=None)
        reached: dict[ValueId, list[Ids]] = defaultdict(list)
        routes = self.draft.routes(index)
        for route in routes:
            pairs = self._same_scale(index, route)
            source, target = pairs.source, pairs.target
            reached[route.target] += (target, pairs.right)
            if tie.shift is ShiftRule.EQUAL:
                self._parts.shift.add(source, target, index)
            if tie.sign is Sign.POSITIVE:
                self._parts.positive.append((target, index))
            if tie.sign is Sign.POSITIVE or tie.shift is ShiftRule.ZERO:
                self._parts.stiff.append(target)
        if tie.shift is ShiftRule.ZERO:
            for value in {v for r in routes for v in (r.source, r.target)}:
                self._fence_shift(value, Refusal(Reason.SHIFT, (name,)))
        fence = Refusal(Reason.NO_LINEAR_NEIGHBOUR, (name,))
        partial = {
            r.target for r in routes for link in r.links or () if link.target_index is not None
        }
        for value in partial:
            self._fence_rest(value, np.concatenate(reached[value]), fence)
            if self._has_gaps(value, routes):
                self._fence(value, fence)
        if tie.fill:
            self._fence_all(index, fence)
        self._fence_others(index, {v for r in routes for v in (r.source, r.target)}, fence)

    def _filled(self, index: int) -> bool:
        """Whether one constant fits what operator ``index`` adds, whatever the units around it."""
        ends = (self.draft.input(index), self.draft.output(index))
        return all(v in self.numbering.values and not self.numbering.axes[v] for v in ends)

    def _has_gaps(self, value: ValueId, routes: Sequence[Route]) -> bool:
        """Whether, along an axis that is not numbered, entries are reached by no route."""
        joined: dict[tuple[int, ...], set[int]] = {}
        for route in routes:
            for link in route.links or ():
                if route.target == value and link.target_index is not None:
                    joined.setdefault(link.target, set()).update(link.target_index.tolist())
        for axes, entries in joined.items():
            sizes = [self.numbering.size(value, axis) for axis in axes]
            known = [size for size in sizes if size is not None]
            numbered = set(axes) <= set(self.numbering.axes[value])
            if not numbered and (len(known) < len(sizes) or len(entries) < prod(known)):
                return True
        return False

    def _sum(self, index: int, total: Sum) -> None:
        routes = self.draft.routes(index)
        output = self.draft.output(index)
        rows = self.numbering.of(output).ravel()
        columns = [rows]
        start = self.numbering.start[output]
        for route in routes:
            pairs = self._same_scale(index, route)
            found = np.full(rows.size, -1)
            found[pairs.target - start] = pairs.source
            # Where the input is repeated along an axis, its one entry is in every equation.
            along = (pairs.right >= start) & (pairs.right < start + rows.size)
            found[pairs.right[along] - start] = found[pairs.left[along] - start]
            columns.append(found)
            self._parts.stiff.append(pairs.target)
        used = {r.source for r in routes} | {output}
        self._fence_others(index, used, Refusal(Reason.NO_LINEAR_NEIGHBOUR, (total.name,)))
        whole = np.all([column >= 0 for column in columns], axis=0)
        self._parts.sums.append(([c[whole] for c in columns], [-1, *total.signs], index))

    def _same_scale(self, index: int, route: Route) -> Pairs:
        """Tie the scales along a route, and units along the axes that are in no link."""
        pairs = self.numbering.pairs(route)
        self._parts.scale.add(pairs.source, pairs.target, index)
        self._alike(pairs.left, pairs.right, index)
        return pairs

    # ---- products ----

    def _choose_gates(self) -> None:
        """Let the factor that is in true units anyway be the gate; else the smaller one."""
        if not self._products:
            return
        found = Potentials.settled(self.numbering.count, 1.0, self._parts.scale.edges())
        for index in self._products:
            operator = self.draft.operator(index)
            assert isinstance(operator, Product)
            self._product(index, operator, found)

    def _product(self, index: int, product: Product, found: Potentials) -> None:
        routes = self.draft.routes(index)
        factors = [route.source for route in routes]
        anchored = [bool((found.root[self.numbering.of(v)] == 0).all()) for v in factors]
        sizes = [bytes_of(self.draft, v) for v in factors]
        gate = 0 if anchored == [True, False] else 1
        if anchored[0] == anchored[1]:
            gate = 0 if sizes[0] < sizes[1] else 1
        fence = Refusal(Reason.SHIFT, (product.name,), "it multiplies two activations")
        for value in {*factors, self.draft.output(index)}:
            self._fence_shift(value, fence)
        if factors[0] == factors[1]:
            self._fence_all(index, Refusal(Reason.NO_LINEAR_NEIGHBOUR, (product.name,)))
            return
        true = Refusal(Reason.NO_LINEAR_NEIGHBOUR, (product.name,), "a factor of it")
        self._fence(factors[gate], true)
        self._parts.stiff.append(self._same_scale(index, routes[1 - gate]).target)
        used = {*factors, self.draft.output(index)}
        self._fence_others(index, used, fence)

    # ---- weights that several operators read ----

    def _agree(self, readers: list[int]) -> None:
        """All operators that read one weight scale it alike, or none scales it."""
        first = self.draft.operator(readers[0])
        assert isinstance(first, Linear)
        assert first.weight is not None
        alike = {self._view(index) for index in readers}
        whole = len(readers) == len(first.weight.readers) and len(alike) == 1
        for side in (self.reads, self.writes):
            numbers = [side.get(index) for index in readers]
            if whole and all(n is not None for n in numbers):
                self.agreeing.add(readers[0])
                for other in numbers[1:]:
                    assert numbers[0] is not None
                    assert other is not None
                    pair = np.broadcast_arrays(numbers[0], other)
                    self._parts.scale.add(pair[0], pair[1], readers[0])
                continue
            for index, found in zip(readers, numbers, strict=True):
                if found is not None:
                    self._fence_shared(index, found)

    def _view(self, index: int) -> tuple[object, ...]:
        linear = self.draft.operator(index)
        assert isinstance(linear, Linear)
        assert linear.weight is not None
        return linear.weight.view, linear.in_channels, linear.out_channels

    def _fence_shared(self, index: int, numbers: Ids) -> None:
        linear = self.draft.operator(index)
        assert isinstance(linear, Linear)
        assert linear.weight is not None
        self._anchor_scale(numbers, shared(linear.weight, linear.name))

    # ---- true units ----

    def _outside(self, value: ValueId) -> None:
        fence = anchored(self.draft, value)
        if fence is not None:
            self._fence(value, fence)
        elif self.draft.producer(value) is None:
            name = f"'{self.draft.values[value].name}'"
            self._fence(value, Refusal(Reason.NO_LINEAR_NEIGHBOUR, (name,)))

    def _on_axis(self, index: int, value: ValueId, axis: int, channels: int, name: str) -> bool:
        """Whether units next to an operator lie on its channels; all others are made equal."""
        numbers = self.numbering.along(value, axis)
        if numbers.size not in (1, channels):
            detail = f"{numbers.size} against {channels}"
            self._fence(value, Refusal(Reason.CHANNEL_AXIS, (name,), detail))
            return False
        self._tie_beside(value, axis, index)
        return True

    def _tie_beside(self, value: ValueId, axis: int | None, index: int) -> None:
        self._alike(*self.numbering.beside(value, axis), index)

    def _alike(self, left: Ids, right: Ids, index: int) -> None:
        if left.size:
            self._parts.scale.add(left, right, index)
            self._parts.shift.add(left, right, index)

    def _fence_all(self, index: int, fence: Refusal) -> None:
        self._fence_others(index, set(), fence)

    def _fence_others(self, index: int, but: set[ValueId], fence: Refusal) -> None:
        operator = self.draft.operator(index)
        outputs = (self.draft.resolve(v) for v in operator.outputs)
        inputs = self.draft.inputs(index)
        routes = [route.source for route in self.draft.routes(index)]
        for value in (*inputs, *outputs):
            # A value may be on a route and be read once more, beside it.
            if value not in but or inputs.count(value) > max(1, routes.count(value)):
                self._fence(value, fence)

    def _fence_rest(self, value: ValueId, reached: Ids, fence: Refusal) -> None:
        numbers = self.numbering.of(value).ravel()
        rest = numbers[~np.isin(numbers, reached)]
        self._anchor_scale(rest, fence)
        self._anchor_shift(rest, fence)

    def _fence(self, value: ValueId, fence: Refusal) -> None:
        if value in self.numbering.values:
            self._anchor_scale(self.numbering.of(value).ravel(), fence)
            self._fence_shift(value, fence)

    def _fence_shift(self, value: ValueId, fence: Refusal) -> None:
        if value in self.numbering.values:
            self._anchor_shift(self.numbering.of(value).ravel(), fence)

    def _anchor_scale(self, numbers: Ids, fence: Refusal) -> None:
        if numbers.size:
            self._parts.scale.add(np.zeros_like(numbers), numbers)
            self.scale_fences.append((numbers, fence))

    def _anchor_shift(self, numbers: Ids, fence: Refusal) -> None:
        if numbers.size:
            self._parts.shift.add(np.zeros_like(numbers), numbers)
            self.shift_fences.append((numbers, fence))


def bytes_of(draft: Draft, value: ValueId) -> int:
    """The size of a value, with 1 for what is not known."""
    stated = draft.values[value]
    known = prod(dim for dim in stated.shape or () if isinstance(dim, int))
    return known * number_type(stated.dtype).nbytes


def _none() -> Ids:
    return np.zeros(0, np.int64)


def _as_rows(parts: list[tuple[list[Ids], list[int], int]]) -> Sums:
    width = max((len(columns) for columns, _, _ in parts), default=0)
    numbers, factors, owner = [], [], []
    for columns, signs, index in parts:
        rows = columns[0].size
        padded = [*columns, *(np.full(rows, -1) for _ in range(width - len(columns)))]
        numbers.append(np.stack(padded, axis=1))
        row = np.array([*signs, *(0 for _ in range(width - len(columns)))], dtype=np.float64)
        factors.append(np.broadcast_to(row, (rows, width)))
        owner.append(np.full(rows, index))
    if not parts:
        return Sums(np.zeros((0, 1), np.int64), np.zeros((0, 1)), np.zeros(0), _none())
    owners = np.concatenate(owner)
    every, shares = np.concatenate(numbers), np.concatenate(factors)
    return Sums(every, shares, np.zeros(owners.size), owners)
