"""Shapes in a torch graph that was recorded without example inputs: what its operations prove.

    conv2d(x, w)           x is (N, C, ., .), and so is the result: convolutions read batches
    BatchNorm2d(x)         x has rank 4, and as many channels as there are running statistics
    x.view(b, g, -1)       rank 3, whatever x is
    x.mean([2, 3])         the rank of x less 2
    linear(x, w)           the rank of x: unknown unless something else proves it

That a convolution reads a batch is the one assumption; all else holds for every input for which
the model runs. What an operation asks of its input goes back to where that was made, so that a
graph is gone through until nothing new is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfold.torch_calls import Call
from bnfold.torch_constants import Constants, UncomputableError
from bnfold.torch_leaves import is_unmodified
from bnfold.torch_reparam import foreign_hooks
from bnfold.torch_schemas import Held
from bnfold.torch_shape_asked import Array, Asked, Known, Number, Pieces, Rule, Shape
from bnfold.torch_shape_index import INDICES
from bnfold.torch_shape_layers import LAYERS
from bnfold.torch_shape_moves import MOVES
from bnfold.torch_shape_values import VALUES
from bnfold.torch_sizes import Symbols
from bnfold.torch_walk import Walk

_TABLE: Mapping[str, Rule] = {**LAYERS, **VALUES, **INDICES, **MOVES}

_SWEEPS = 12  # each goes one step back at least; what is not found by then stays unknown

# In place, these change the shape of the very tensor that later operations read.
_RESHAPE_IN_PLACE = frozenset({
    "as_strided", "requantize", "resize", "resize_as", "resize_as_sparse", "set", "set_data",
    "sparse_resize", "sparse_resize_and_clear", "squeeze", "swapaxes", "swapdims", "t",
    "transpose", "unsqueeze",
})  # fmt: skip


def known_shapes(walk: Walk, constants: Constants) -> Mapping[fx.Node, Shape]:
    """The shapes that are proved; a node whose rank is unknown is absent.

    Sizes that are not known by number are symbols: where two are the same, the sizes are equal in
    every run. Nothing is known of a graph that changes the shape of a tensor in place, or that
    runs a node twice.
    """
    runs = Counter(call.node for call in walk.calls)
    if any(_reshapes_in_place(call) for call in walk.calls) or runs.total() > len(runs):
        return {}
    return _Inference(walk, constants).run()


def _reshapes_in_place(call: Call) -> bool:
    if call.node.kwargs.get("out") is not None or call["out"] is not None:
        return True
    bare = call.op.rstrip("_")
    return bare in _RESHAPE_IN_PLACE and (bool(call.mutates) or bare != call.op)


class _Inference:
    """What is known so far; see ``known_shapes``."""

    def __init__(self, walk: Walk, constants: Constants) -> None:
        self._calls = [call for call in walk.calls if _is_torchs(call)]
        self._constants = constants
        self._values: dict[fx.Node, Known] = {}
        self._asked: dict[fx.Node, Array] = {}
        self._graphs: dict[fx.Graph, str] = {}
        self._symbols = Symbols()

    def run(self) -> Mapping[fx.Node, Shape]:
        """Go through the graph until nothing new is found."""
        for _ in range(_SWEEPS):
            before = (len(self._asked), self._symbols.count)
            for call in self._calls:
                self._values[call.node] = self._made(call)
            if before == (len(self._asked), self._symbols.count):
                break
        found = {node: self.known(node) for node in self._values}
        return {node: value.shape for node, value in found.items() if isinstance(value, Array)}

    # ---- what rules ask ----

    def known(self, argument: Any) -> Known:
        """What is known of an argument; None when nothing is."""
        if isinstance(argument, Held) or self._constants.name(argument) is not None:
            return self._stored(argument)
        if isinstance(argument, Tensor):
            return Array(tuple(argument.shape))
        if isinstance(argument, fx.Node):
            return self._resolved(self._values.get(argument))
        if isinstance(argument, list | tuple):
            return tuple(self.known(entry) for entry in argument)
        if isinstance(argument, float | bool):
            return Number()
        return argument if isinstance(argument, int | slice | EllipsisType) else None

    def prove(self, argument: Any, shape: Shape) -> None:
        """Note that an argument has ``shape``, whose unknown sizes are None."""
        known = self.known(argument)
        if isinstance(known, Array):
            self.equate(known.shape, shape)
        elif known is None and isinstance(argument, fx.Node) and argument not in self._asked:
            named = Array(self._shape(argument, shape))
            self._asked[argument] = self._values[argument] = named

    def equate(self, one: Shape, other: Shape) -> None:
        """Note that two shapes are equal, if their ranks are."""
        if len(one) == len(other):
            for first, second in zip(one, other, strict=True):
                self._symbols.equate(first, second)

    def asked(self, node: fx.Node) -> Array | None:
        """What others ask that the shape of ``node`` be."""
        found = self._resolved(self._asked.get(node))
        return found if isinstance(found, Array) else None

    def symbol(self, node: fx.Node, *place: int) -> str:
        """The name of a size that nothing else is known of."""
        if node.graph not in self._graphs:
            number = len(self._graphs)
            self._graphs[node.graph] = f"{number}:" if number else ""
        return ".".join((self._graphs[node.graph] + node.name, *map(str, place)))

    # ---- how it is found ----

    def _made(self, call: Call) -> Known:
        rule = _TABLE.get(call.op)
        value = rule(Asked(self, call)) if rule else None
        asked = self._asked.get(call.node)
        if value is None:
            value = asked or self._computed(call.node)
        found = self._named(call.node, value)
        if isinstance(found, Array) and asked is not None:
            self.equate(found.shape, asked.shape)
        return found

    def _computed(self, node: fx.Node) -> Array | None:
        """The shape of a constant that only computing it tells."""
        if self._constants.computed(node) is None:
            return None
        try:
            return Array(tuple(self._constants.tensor(node).shape))
        except UncomputableError:
            return None

    def _stored(self, argument: Any) -> Array | None:
        try:
            return Array(tuple(self._constants.stored(argument).shape))
        except KeyError:  # a reparametrised weight: the graph holds what it is computed from
            return None

    def _named(self, node: fx.Node, value: Known, *place: int) -> Known:
        """``value`` with a symbol for every unknown size of a tensor."""
        if isinstance(value, tuple):
            return tuple(self._named(node, entry, *place, k) for k, entry in enumerate(value))
        return Array(self._shape(node, value.shape, *place)) if isinstance(value, Array) else value

    def _shape(self, node: fx.Node, shape: Shape, *place: int) -> Shape:
        return tuple(
            self.symbol(node, *place, axis) if size is None else size
            for axis, size in enumerate(shape)
        )

    def _resolved(self, value: Known) -> Known:
        if isinstance(value, Array | Pieces):
            return type(value)(tuple(self._symbols.resolve(dim) for dim in value.shape))
        if isinstance(value, tuple):
            return tuple(self._resolved(entry) for entry in value)
        return self._symbols.resolve(value) if isinstance(value, str) else value


_HOMES = frozenset({"torch", "_operator", "builtins"})


def _is_torchs(call: Call) -> bool:
    """Whether an operation is torch's own, as its name says, and nobody changes what it gives."""
    target = call.node.target
    if call.module is not None:
        return _is_plain(call.module, call.op)
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    if isinstance(target, torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
        return False
    home = getattr(target, "__module__", None) or "torch"
    return call.node.op == "call_method" or home.split(".")[0] in _HOMES


def _is_plain(module: nn.Module, op: str) -> bool:
    if foreign_hooks(module):
        return False
    if op != type(module).__name__:  # known to be what the operation says
        return True
    ours = type(module).__module__.startswith("torch.nn.modules.")
    return ours and is_unmodified(module, type(module))
