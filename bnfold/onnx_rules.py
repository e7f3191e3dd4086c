"""What a rule of the operator table may ask of an ONNX node, and how it states its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnfold.channel_graph import (
    Dim,
    Link,
    Operator,
    Product,
    Route,
    ShiftRule,
    Sign,
    Sum,
    Tie,
    ValueId,
)
from bnfold.onnx_facts import FLOAT_TYPES, Facts, input_at, int_attribute

Links = tuple[Link, ...]


class UnstatedError(Exception):
    """Too little is known of a node to state it: it counts as unknown."""


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A route between input ``source`` and output ``target`` of a node, by position."""

    source: int = 0
    links: Links | None = None
    target: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One node, and all that is known of it.

    ``number`` gives the number of an activation, ``readers`` the names of all operators that
    read the storage of a constant.
    """

    facts: Facts
    node: ir.Node
    graph: ir.Graph
    number: Callable[[ir.Value], ValueId]
    readers: Callable[[ir.Value], tuple[str, ...]]

    # ---- questions ----

    @property
    def opset(self) -> int:
        """The version of ``ai.onnx`` that the node is written for."""
        return self.facts.opset(self.graph)

    def value(self, position: int = 0) -> ir.Value:
        """Input ``position``, which has to be there."""
        value = input_at(self.node, position)
        if value is None:
            raise UnstatedError
        return value

    def given(self, position: int) -> bool:
        """Whether the optional input ``position`` is there."""
        return input_at(self.node, position) is not None

    def is_constant(self, position: int) -> bool:
        """Whether input ``position`` is known before the model runs."""
        return self.facts.constants.is_constant(input_at(self.node, position))

    def shape(self, position: int = 0) -> tuple[Dim, ...]:
        """The shape of an input, whose rank has to be known."""
        return _known(self.facts.shape(self.value(position)))

    def made(self, position: int = 0) -> tuple[Dim, ...] | None:
        """The shape of an output; None when its rank is unknown."""
        return self.facts.shape(self.node.outputs[position])

    def rank(self) -> int:
        """The rank of the first input, of an operator that keeps it."""
        return len(_known(self.facts.shape(self.value()) or self.made()))

    def array(self, position: int) -> NDArray[np.float64]:
        """Input ``position``, which has to be a constant."""
        if not self.is_constant(position):
            raise UnstatedError
        return self.facts.constants.float64(self.value(position))

    def numbers(self, name: str, position: int) -> tuple[float, ...] | None:
        """What old versions state as the attribute ``name`` and new ones as an input, if given."""
        attribute = self.node.attributes.get(name)
        if attribute is not None:
            return tuple(attribute.value)
        if not self.given(position):
            return None
        return tuple(float(k) for k in self.array(position).ravel())

    def integers(self, name: str, position: int) -> tuple[int, ...] | None:
        """The same, for sizes and axes."""
        attribute = self.node.attributes.get(name)
        if attribute is not None:
            return tuple(int(k) for k in attribute.as_ints())
        if not self.given(position):
            return None
        if not self.is_constant(position):
            raise UnstatedError
        # Not by way of float64: the largest int64 stands for "to the end".
        array = np.ravel(self.facts.constants.array(self.value(position)))
        if array.dtype.kind not in "iu":
            raise UnstatedError
        return tuple(int(k) for k in array)

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int_attribute(self.node, name, default)

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()

    # ---- answers ----

    @property
    def inputs(self) -> tuple[ValueId, ...]:
        """All activations that the node reads, in order."""
        read = (v for v in self.node.inputs if v is not None)
        return tuple(self.number(v) for v in read if not self.facts.constants.is_constant(v))

    @property
    def outputs(self) -> tuple[ValueId, ...]:
        """All outputs that have a name, in order."""
        return tuple(self.number(v) for v in self.node.outputs if v.name)

    def tie(self, sign: Sign, shift: ShiftRule, *ways: Way) -> Tie:
        """A tie along ``ways``; without any, the first input is the output, entry by entry."""
        return Tie(
            name=self.facts.label(self.node), op_type=self.node.op_type, inputs=self.inputs,
            outputs=self.outputs, sign=sign, shift=shift, routes=self._routes(ways or (Way(),)),
        )  # fmt: skip

    def sum(self, signs: Sequence[int], *ways: Way) -> Sum:
        """A sum over ``ways``, one for each input."""
        return Sum(
            name=self.facts.label(self.node), op_type=self.node.op_type, inputs=self.inputs,
            outputs=self.outputs, signs=tuple(signs), routes=self._routes(ways),
        )  # fmt: skip

    def product(self, first: Way, second: Way) -> Product:
        """The product of two inputs."""
        pair = (self._route(first), self._route(second))
        if pair[0].source == pair[1].source:
            raise UnstatedError  # a square: one factor can't be in units that the other is not in
        return Product(
            name=self.facts.label(self.node), op_type=self.node.op_type, inputs=self.inputs,
            outputs=self.outputs, routes=pair,
        )  # fmt: skip

    def _routes(self, ways: Sequence[Way]) -> tuple[Route, ...]:
        routes = tuple(self._route(way) for way in ways)
        used = {way.source for way in ways}
        tied = {route.source for route in routes}
        for position, value in enumerate(self.node.inputs):
            aside = position not in used and value is not None
            if (
                aside
                and not self.is_constant(position)
                and self.number(self.value(position)) in tied
            ):
                raise UnstatedError  # the same tensor is also read in true units
        alike = all(route.links is None for route in routes) and len(self.outputs) == 1
        return () if alike and tuple(r.source for r in routes) == self.inputs else routes

    def _route(self, way: Way) -> Route:
        source, target = self.value(way.source), self.node.outputs[way.target]
        if self.is_constant(way.source) or not target.name:
            raise UnstatedError
        for value in (source, target):
            # Where nothing states the type, it is that of its neighbours: only Cast changes it.
            if self.facts.dtype(value) not in FLOAT_TYPES | {None}:
                raise UnstatedError
        return Route(self.number(source), self.number(target), way.links)


Rule = Callable[[Asked], Operator]


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise UnstatedError
    return axis % rank if rank else 0


def axes_of(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Axes counted from the front, in order."""
    return tuple(sorted({axis_of(axis, rank) for axis in axes}))


def _known(shape: tuple[Dim, ...] | None) -> tuple[Dim, ...]:
    if shape is None:
        raise UnstatedError
    return shape
