"""How the rule of an operator table states its answer, whatever the framework.

A rule is asked about one operator. It gives ways: which entries of which input are which entries
of which output. From these it makes a Tie, a Sum or a Product; or it says that it can't.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from bnfold.channel_graph import (
    Dim,
    Link,
    Product,
    Route,
    ShiftRule,
    Sign,
    Sum,
    Tie,
    ValueId,
)

Links = tuple[Link, ...]


class UnstatedError(Exception):
    """Too little is known of an operator to state it: it counts as unknown."""


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A route between input ``source`` and output ``target`` of an operator, by position."""

    source: int = 0
    links: Links | None = None
    target: int = 0


class Stating(ABC):
    """One operator of which something is to be stated."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call the operator."""

    @property
    @abstractmethod
    def op_type(self) -> str:
        """What kind of operator it is, in its framework's words."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[ValueId, ...]:
        """All activations that the operator reads, in order."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[ValueId, ...]:
        """All activations that the operator makes, in order."""

    @abstractmethod
    def route(self, way: Way) -> Route:
        """``way`` between numbered values.

        Raises:
            UnstatedError: One of its ends is no activation of a float type.
        """

    @abstractmethod
    def operands(self) -> Sequence[ValueId | None]:
        """What the positions of ways count: None where there is no activation."""

    def tie(self, sign: Sign, shift: ShiftRule, *ways: Way) -> Tie:
        """A tie along ``ways``; without any, the first input is the output, entry by entry."""
        return Tie(
            name=self.name, op_type=self.op_type, inputs=self.inputs, outputs=self.outputs,
            sign=sign, shift=shift, routes=self._routes(ways or (Way(),)),
        )  # fmt: skip

    def sum(self, signs: Sequence[int], *ways: Way) -> Sum:
        """A sum over ``ways``, one for each input."""
        return Sum(
            name=self.name, op_type=self.op_type, inputs=self.inputs, outputs=self.outputs,
            signs=tuple(signs), routes=self._routes(ways),
        )  # fmt: skip

    def product(self, first: Way, second: Way) -> Product:
        """The product of two inputs."""
        pair = (self.route(first), self.route(second))
        if pair[0].source == pair[1].source:
            raise UnstatedError  # a square: one factor can't be in units that the other is not in
        return Product(
            name=self.name, op_type=self.op_type, inputs=self.inputs, outputs=self.outputs,
            routes=pair,
        )  # fmt: skip

    def _routes(self, ways: Sequence[Way]) -> tuple[Route, ...]:
        routes = tuple(self.route(way) for way in ways)
        used = {way.source for way in ways}
        tied = {route.source for route in routes}
        for position, value in enumerate(self.operands()):
            if position not in used and value in tied:
                raise UnstatedError  # the same tensor is also read in true units
        alike = all(route.links is None for route in routes) and len(self.outputs) == 1
        return () if alike and tuple(r.source for r in routes) == self.inputs else routes


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise UnstatedError
    return axis % rank if rank else 0


def axes_of(axes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Axes counted from the front, in order."""
    return tuple(sorted({axis_of(axis, rank) for axis in axes}))


def known(shape: tuple[Dim, ...] | None) -> tuple[Dim, ...]:
    """A shape, whose rank has to be known."""
    if shape is None:
        raise UnstatedError
    return shape
