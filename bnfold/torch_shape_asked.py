"""What a rule about shapes may ask of a torch operation, and the words of its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Protocol

from torch import Tensor, fx

from bnfold.channel_graph import Dim
from bnfold.torch_calls import Call
from bnfold.torch_schemas import Held

Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor of this shape. In a rule's answer, None is a size that nothing is known of."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tensors of this shape, nobody knows how many; None is a size that differs among them."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class Number:
    """A number, nobody knows which; it may be negative or a fraction."""


# A size is an int or the name of a size: never negative if it is a name.
Known = Array | Pieces | Number | int | str | tuple[Any, ...] | slice | EllipsisType | None


class State(Protocol):
    """What is known of a graph so far."""

    def known(self, argument: Any) -> Known:
        """What is known of an argument; None when nothing is."""

    def prove(self, argument: Any, shape: Shape) -> None:
        """Note that an argument has ``shape``, whose unknown sizes are None."""

    def equate(self, one: Shape, other: Shape) -> None:
        """Note that two shapes are equal, if their ranks are."""

    def asked(self, node: fx.Node) -> Array | None:
        """What others ask that the shape of ``node`` be."""

    def symbol(self, node: fx.Node, *place: int) -> str:
        """The name of a size that nothing else is known of."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One operation, and what is known before it."""

    state: State
    call: Call

    @property
    def data(self) -> Any:
        """The first operand, also of an operation whose schema is not known."""
        arguments = self.call.arguments
        return arguments.get("input", arguments.get("0"))

    def known(self, name: str) -> Known:
        """What is known of an argument."""
        return self.state.known(self.call[name])

    def shape(self, name: str = "input") -> Shape | None:
        """The shape of a tensor; None when its rank is unknown."""
        found = self.known(name)
        return found.shape if isinstance(found, Array) else None

    def prove(self, shape: Shape, name: str = "input") -> Shape | None:
        """Note that a tensor has this shape; what is known of it then."""
        self.state.prove(self.call[name], shape)
        return self.shape(name)

    def size(self, name: str) -> Dim:
        """A number or a size."""
        found = self.known(name)
        return found if isinstance(found, int | str) else None

    def sizes(self, name: str) -> Shape | None:
        """A list of sizes, or a single one; None when not even their number is known."""
        return self.sizes_of(self.call[name])

    def sizes_of(self, argument: Any) -> Shape | None:
        """See ``sizes``."""
        found = self.state.known(argument)
        listed = found if isinstance(found, tuple) else (found,)
        if len(listed) == 1 and isinstance(listed[0], tuple):
            listed = listed[0]
        if len(listed) == 1 and not isinstance(listed[0], int | str):
            return None
        return tuple(v if isinstance(v, int | str) else None for v in listed)

    def each(self, name: str, count: int, default: Shape) -> Shape:
        """A size for each of ``count`` axes, given as a list or as one for all."""
        given = self.call[name]
        absent = given is None or given in ([], ())
        return spread(default if absent else self.sizes_of(given), count)

    def axis(self, name: str, rank: int) -> int | None:
        """An axis, counted from the front."""
        found = self.known(name)
        if not isinstance(found, int) or not -rank <= found < rank:
            return None
        return found % rank

    def axes(self, name: str, rank: int) -> tuple[int, ...] | None:
        """Axes, counted from the front."""
        found = self.sizes(name)
        if found is None or not all(isinstance(v, int) and -rank <= v < rank for v in found):
            return None
        return tuple(int(axis or 0) % rank for axis in found)

    def same(self) -> Known:
        """The shape of the first operand, which is that of the result."""
        found = self.state.known(self.data)
        made = self.state.asked(self.call.node)
        if found is None and made is not None:
            self.state.prove(self.data, made.shape)
            found = made
        return found if isinstance(found, Array) else None

    def tensors(self) -> list[Any]:
        """The arguments that are no literals."""
        values = self.call.arguments.values()
        return [value for value in values if isinstance(value, fx.Node | Held | Tensor)]


def spread(sizes: Shape | None, count: int) -> Shape:
    """Sizes for ``count`` axes, of which one may stand for all."""
    if sizes is None:
        return (None,) * count
    listed = sizes * count if len(sizes) == 1 else sizes
    return listed if len(listed) == count else (None,) * count


def with_sizes(shape: Shape, axis: int, *sizes: Dim) -> Shape:
    """``shape`` with other sizes in place of that on ``axis``."""
    return (*shape[:axis], *sizes, *shape[axis + 1 :])


def data_and_axis(asked: Asked, name: str = "dim") -> tuple[Shape, int] | None:
    """The shape of the first operand, and an axis of it."""
    data = asked.shape()
    axis = None if data is None else asked.axis(name, len(data))
    return None if data is None or axis is None else (data, axis)


Rule = Callable[[Asked], Known]
