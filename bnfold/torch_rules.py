"""What a rule of the operator table may ask of a torch operation, and how it states its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from bnfold.channel_graph import Operator, Route, ValueId
from bnfold.stating import Links, Stating, UnstatedError, Way, axes_of, axis_of, known
from bnfold.torch_calls import Call
from bnfold.torch_constants import UncomputableError
from bnfold.torch_facts import Facts, Shape
from bnfold.torch_schemas import Held

__all__ = ["Asked", "Links", "Rule", "UnstatedError", "Way", "axes_of", "axis_of"]

_OPERANDS = frozenset({"input", "other"})  # these may be numbers


@dataclass(frozen=True, eq=False)
class Asked(Stating):
    """One operation, and all that is known of it.

    Operands go by their position among the tensor arguments, in the order of the schema; the
    entries of a list of tensors count one by one, and ``input`` and ``other`` count even where
    they are numbers. Results go by their position too.

    ``number`` gives the number of an activation, ``readers`` the names of all operations that
    read the storage of a constant. ``results`` are the nodes of its outputs, by position.
    """

    facts: Facts
    call: Call
    number: Callable[[fx.Node], ValueId]
    readers: Callable[[Any], tuple[str, ...]]
    results: Mapping[int, fx.Node]

    # ---- questions ----

    @property
    def op(self) -> str:
        """The operation in ATen's words."""
        return self.call.op

    @property
    def sources(self) -> list[Any]:
        """The operands."""
        found: list[Any] = []
        for name, value in self.call.arguments.items():
            if name == "tensors" and isinstance(value, list | tuple):
                found += value
            elif name in _OPERANDS or self._is_tensor(value):
                found.append(value)
        return found

    def _is_tensor(self, value: Any) -> bool:
        if isinstance(value, fx.Node):
            return self.facts.is_tensor(value)
        return isinstance(value, Held | Tensor)

    def value(self, position: int = 0) -> Any:
        """Operand ``position``, which has to be there."""
        sources = self.sources
        if position >= len(sources):
            raise UnstatedError
        return sources[position]

    def is_constant(self, position: int) -> bool:
        """Whether an operand is known before the graph runs."""
        value = self.value(position)
        return isinstance(value, Tensor) or self.facts.constants.is_constant(value)

    def shape(self, position: int = 0) -> Shape:
        """The shape of an operand, whose rank has to be known."""
        return known(self.facts.shape(self.value(position)))

    def made(self, position: int = 0) -> Shape | None:
        """The shape of a result; None when its rank is unknown."""
        node = self.results.get(position)
        return None if node is None else self.facts.shape(node)

    def rank(self) -> int:
        """The rank of the first operand, of an operation that keeps it."""
        return len(known(self.facts.shape(self.value()) or self.made()))

    def array(self, position: int) -> NDArray[np.float64]:
        """An operand, which has to be a constant."""
        if not self.is_constant(position):
            raise UnstatedError
        try:
            return self.facts.constants.float64(self.value(position))
        except UncomputableError as error:
            raise UnstatedError from error

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument that has to be known: no node, nor a list with one."""
        value = self.call.arguments.get(name, default)
        if any(
            isinstance(v, fx.Node) for v in (value if isinstance(value, list | tuple) else [value])
        ):
            raise UnstatedError
        return value

    def integers(self, name: str) -> tuple[int, ...] | None:
        """A list of whole numbers, or a single one; None where it is not given."""
        value = self.argument(name)
        if value is None:
            return None
        listed = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(v, int) for v in listed):
            raise UnstatedError
        return tuple(int(v) for v in listed)

    def axes(self, name: str = "dim") -> tuple[int, ...] | None:
        """Axes of the first operand, counted from the front; None where none are given."""
        given = self.integers(name)
        return None if given is None else axes_of(given, len(self.shape()))

    # ---- answers ----

    @property
    def name(self) -> str:
        """The name of the operation in reports."""
        return self.facts.label(self.call)

    @property
    def op_type(self) -> str:
        """The class of its module, or the operation."""
        return self.facts.kind(self.call)

    @property
    def inputs(self) -> tuple[ValueId, ...]:
        """All activations that the operation reads, in order."""
        return tuple(value for value in self.operands() if value is not None)

    @property
    def outputs(self) -> tuple[ValueId, ...]:
        """All results that somebody takes, in order."""
        return tuple(self.number(node) for _, node in sorted(self.results.items()))

    def operands(self) -> Sequence[ValueId | None]:
        """The numbers of the operands; None where one is no activation."""
        return [self.number(v) if self._is_activation(v) else None for v in self.sources]

    def _is_activation(self, value: Any) -> bool:
        if not isinstance(value, fx.Node) or self.facts.constants.is_constant(value):
            return False
        return self.facts.is_tensor(value)

    def route(self, way: Way) -> Route:
        """``way`` between numbered values."""
        source, target = self.value(way.source), self.results.get(way.target)
        if target is None or not self._is_activation(source):
            raise UnstatedError
        if not (self.facts.is_float(source) and self.facts.is_float(target)):
            raise UnstatedError
        return Route(self.number(source), self.number(target), way.links)


Rule = Callable[[Asked], Operator]
