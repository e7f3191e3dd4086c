"""What a rule of the operator table may ask of an ONNX node, and how it states its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnfold.channel_graph import Dim, Operator, Route, ValueId
from bnfold.onnx_facts import FLOAT_TYPES, Facts, input_at, int_attribute
from bnfold.stating import Links, Stating, UnstatedError, Way, axes_of, axis_of, known

__all__ = ["Asked", "Links", "Rule", "UnstatedError", "Way", "axes_of", "axis_of"]


@dataclass(frozen=True, eq=False)
class Asked(Stating):
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
        return known(self.facts.shape(self.value(position)))

    def made(self, position: int = 0) -> tuple[Dim, ...] | None:
        """The shape of an output; None when its rank is unknown."""
        return self.facts.shape(self.node.outputs[position])

    def rank(self) -> int:
        """The rank of the first input, of an operator that keeps it."""
        return len(known(self.facts.shape(self.value()) or self.made()))

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
    def name(self) -> str:
        """The node's name, or what it makes."""
        return self.facts.label(self.node)

    @property
    def op_type(self) -> str:
        """The operator's name in ONNX."""
        return self.node.op_type

    @property
    def inputs(self) -> tuple[ValueId, ...]:
        """All activations that the node reads, in order."""
        return tuple(value for value in self.operands() if value is not None)

    @property
    def outputs(self) -> tuple[ValueId, ...]:
        """All outputs that have a name, in order."""
        return tuple(self.number(v) for v in self.node.outputs if v.name)

    def operands(self) -> Sequence[ValueId | None]:
        """The inputs of the node; None where one is constant or not given."""
        is_constant = self.facts.constants.is_constant
        return [None if v is None or is_constant(v) else self.number(v) for v in self.node.inputs]

    def route(self, way: Way) -> Route:
        """``way`` between numbered values."""
        source, target = self.value(way.source), self.node.outputs[way.target]
        if self.is_constant(way.source) or not target.name:
            raise UnstatedError
        for value in (source, target):
            # Where nothing states the type, it is that of its neighbours: only Cast changes it.
            if self.facts.dtype(value) not in FLOAT_TYPES | {None}:
                raise UnstatedError
        return Route(self.number(source), self.number(target), way.links)


Rule = Callable[[Asked], Operator]
