"""A plan in the making: the channel graph with the steps that vanished so far taken out.

A pass asks the draft who reads what, and tells it which step vanishes into which operators.
Nothing of the channel graph itself is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bnfold.affine import AffineMap
from bnfold.channel_graph import (
    Affine,
    Anchor,
    Bias,
    ChannelGraph,
    Linear,
    Operator,
    Product,
    Route,
    Sum,
    Tie,
    ValueId,
)
from bnfold.planning import Absorption, Fold, How, Kept, Stored, Units


class Draft:
    """What is decided so far.

    Args:
        graph: The facts.
        refused: Steps that must not be touched, with the reason.
    """

    def __init__(self, graph: ChannelGraph, refused: Mapping[int, Kept]) -> None:
        self.operators = graph.operators
        self.values = graph.values
        self.refused = refused
        self.anchors: dict[ValueId, Anchor] = dict(graph.anchors)
        self.asked = graph.asked
        self.folds: dict[int, Fold] = {}
        self.absorptions: dict[int, Absorption] = {}
        self.restored: dict[ValueId, Units] = {}
        self._alias: dict[ValueId, ValueId] = {}
        self._routes: dict[int, tuple[Route, ...]] = {}
        self._touching: dict[ValueId, list[int]] = {}
        self._holds: dict[ValueId, ValueId] = {}
        self._inputs = [list(operator.inputs) for operator in graph.operators]
        self._producer: dict[ValueId, int] = {}
        self._readers: dict[ValueId, list[int]] = {}
        for index, operator in enumerate(graph.operators):
            for value in operator.outputs:
                self._producer[value] = index
            for value in operator.inputs:
                self._readers.setdefault(value, []).append(index)

    # ---- looking ----

    def steps(self) -> Iterator[tuple[int, Affine]]:
        """The affine steps that still stand and may be folded, in graph order."""
        for index, operator in enumerate(self.operators):
            if isinstance(operator, Affine) and self.is_open(index):
                yield index, operator

    def is_open(self, index: int) -> bool:
        """Whether operator ``index`` is a foldable affine step that still stands."""
        operator = self.operators[index]
        if not isinstance(operator, Affine) or index in self.folds or index in self.refused:
            return False
        open_by_nature = not (operator.training_mode or operator.unproved or operator.stays)
        return operator.map is not None and open_by_nature

    def operator(self, index: int) -> Operator:
        """Operator ``index``."""
        return self.operators[index]

    def name(self, index: int) -> str:
        """The name of operator ``index`` for reports."""
        return self.operators[index].name

    def input(self, index: int) -> ValueId:
        """The activation that operator ``index`` reads now."""
        return self._inputs[index][0]

    def output(self, index: int) -> ValueId:
        """The activation that operator ``index`` writes."""
        return self.operators[index].outputs[0]

    def inputs(self, index: int) -> list[ValueId]:
        """All activations that operator ``index`` reads now."""
        return self._inputs[index]

    def producer(self, value: ValueId) -> int | None:
        """The operator that writes ``value``; None for an input of the graph."""
        return self._producer.get(value)

    def readers(self, value: ValueId) -> list[int]:
        """The operators that read ``value``, one entry per reading input."""
        return self._readers.get(value, [])

    def touching(self, value: ValueId) -> list[int]:
        """The operators that write or read ``value`` and still stand, each once."""
        if value not in self._touching:
            producer = self._producer.get(value)
            readers = self._readers.get(value, [])
            found = dict.fromkeys(readers if producer is None else [producer, *readers])
            self._touching[value] = [index for index in found if index not in self.folds]
        return self._touching[value]

    def routes(self, index: int) -> tuple[Route, ...]:
        """The routes through operator ``index`` between the values that are left."""
        if index not in self._routes:
            alias = self._alias
            self._routes[index] = tuple(
                Route(self.resolve(r.source), self.resolve(r.target), r.links)
                if r.source in alias or r.target in alias else r
                for r in _stated(self.operators[index])
            )  # fmt: skip
        return self._routes[index]

    def resolve(self, value: ValueId) -> ValueId:
        """The value that took the place of ``value``, or itself."""
        while value in self._alias:
            value = self._alias[value]
        return value

    def holds(self, value: ValueId) -> ValueId:
        """The value of the graph as it was given that ``value`` stands for now."""
        return self._holds.get(value, value)

    def is_seen(self, value: ValueId) -> bool:
        """Whether others than the operators know ``value``, or ask for its sizes."""
        return value in self.anchors or value in self.asked

    def is_free_tie(self, index: int) -> bool:
        """Whether units pass operator ``index`` unchanged."""
        operator = self.operators[index]
        return isinstance(operator, Tie) and operator.free

    def step_map(self, index: int) -> AffineMap:
        """What step ``index`` does now, with all that it absorbed."""
        operator = self.operators[index]
        assert isinstance(operator, Affine)
        assert operator.map is not None
        return self.absorptions.get(index, Absorption()).around(operator.map)

    def has_bias(self, index: int) -> bool:
        """Whether linear operator ``index`` can take a shift without one operator more."""
        operator = self.operators[index]
        assert isinstance(operator, Linear)
        taken = self.absorptions.get(index, Absorption())
        made = any(m is not None and not m.is_scaling for m in (taken.input, taken.output))
        return operator.bias is Bias.BUILT_IN or made

    # ---- deciding ----

    def absorb_output(self, index: int, taken: AffineMap) -> None:
        """Operator ``index`` applies ``taken`` to what it writes."""
        old = self.absorptions.get(index, Absorption())
        output = taken if old.output is None else taken.after(old.output)
        self.absorptions[index] = Absorption(old.input, output, old.axis)

    def absorb_input(self, index: int, taken: AffineMap) -> None:
        """Operator ``index`` applies ``taken`` to what it reads."""
        old = self.absorptions.get(index, Absorption())
        inputs = taken if old.input is None else old.input.after(taken)
        self.absorptions[index] = Absorption(inputs, old.output, old.axis)

    def widen(self, index: int, axis: int) -> None:
        """What step ``index``, a scalar until now, took over lies on ``axis``."""
        old = self.absorptions.get(index, Absorption())
        self.absorptions[index] = Absorption(old.input, old.output, axis)

    def restore(self, value: ValueId, axis: int | None, taken: AffineMap) -> None:
        """``value`` is stored as ``u`` from now on; what it held until now is ``taken(u)``."""
        held, old = self.holds(value), self.restored.get(self.holds(value))
        axes = () if axis is None else (axis,)
        self.restored[held] = Units(axes, taken) if old is None else old.inside(axes, taken)

    def vanish(self, step: int, how: How, into: tuple[int, ...], stored: Stored) -> None:
        """Step ``step`` is gone: the tensors before and after it are one."""
        before, after = self.input(step), self.output(step)
        readers = [index for index in self.readers(before) if index != step]
        for reader in self.readers(after):
            self._inputs[reader] = [before if v == after else v for v in self._inputs[reader]]
            readers.append(reader)
        self._readers[before] = readers
        self._readers.pop(after, None)
        self._alias[after] = before
        self._routes.clear()
        self._touching.clear()
        if stored is Stored.AFTER:
            self._holds[before] = self.holds(after)
        if after in self.anchors:
            anchor = self.anchors.pop(after)
            if before not in self.anchors or anchor is Anchor.OUTPUT:
                self.anchors[before] = anchor
        self.folds[step] = Fold(step, how, into, stored)


def _stated(operator: Operator) -> tuple[Route, ...]:
    if isinstance(operator, Product):
        return operator.routes
    return operator.paths if isinstance(operator, Tie | Sum) else ()
