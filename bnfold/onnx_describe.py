"""describe(model) -> channel graph: the facts of an ONNX model, and where they were found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from bnfold.channel_graph import (
    Affine,
    Anchor,
    ChannelGraph,
    ConstantStep,
    Norm,
    Opaque,
    Operator,
    Tie,
    Value,
)
from bnfold.found import FoundLinear, FoundStep
from bnfold.onnx_constants import bodies
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import Facts, in_order
from bnfold.onnx_gelu import find_gelus
from bnfold.onnx_leftover import alternatives
from bnfold.onnx_linear import LinearSite, as_operator, find_linear
from bnfold.onnx_shapes import Inferred
from bnfold.onnx_steps import BINARY, StepSite, find_step
from bnfold.onnx_tensors import stored_bytes
from bnfold.onnx_ties import find_tie

# Normalisations and arithmetic that are worth nothing at run time when all they read is constant.
_CONSTANT_STEPS = BINARY | {
    "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization",
    "Neg",
}  # fmt: skip
_EVALUATED_BYTES = 1 << 14  # a constant this small may grow when it is evaluated


@dataclass(frozen=True, slots=True)
class ConstantSite:
    """A step over constants only, at its node."""

    node: ir.Node
    graph: ir.Graph


@dataclass(frozen=True, slots=True)
class NormSite:
    """A normalisation with a scale and a shift of its own, as inputs 1 and 2 of its node."""

    node: ir.Node
    graph: ir.Graph


@dataclass(frozen=True, slots=True)
class PadSite:
    """A Pad by a constant, which is input 2 of its node or, before version 11, an attribute."""

    node: ir.Node
    graph: ir.Graph
    value: float


Site = LinearSite | StepSite | ConstantSite | NormSite | PadSite | None


@dataclass(frozen=True, slots=True)
class Described:
    """The channel graph of a model and where it was found: operator by operator, value by value."""

    graph: ChannelGraph
    sites: tuple[Site, ...]
    values: tuple[ir.Value, ...]
    facts: Facts


def describe(
    model: ir.Model, inferred: Inferred | None = None, *, trust_initializers: bool = False
) -> Described:
    """State the facts of ``model``; nothing of it is changed.

    Args:
        model: The model; its subgraphs and functions are described too.
        inferred: Results of shape inference on the main graph.
        trust_initializers: Take initializers that are also graph inputs as constants.

    Raises:
        InvalidModelError: A BatchNormalization has parameters that mean nothing.
    """
    facts = Facts(model, inferred or {}, trust_initializers=trust_initializers)
    return _Walk(facts).run()


class _Walk:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.numbers: dict[ir.Value, int] = {}
        self.values: list[Value] = []
        self.anchors: dict[int, Anchor] = {}
        self.operators: list[Operator] = []
        self.sites: list[Site] = []
        self.stated: set[ir.Node] = set()
        self.absorbed_adds: set[ir.Node] = set()
        self.sizes: set[ir.Value] = set()
        self.readers = _storage_readers(facts)
        self.gelus = find_gelus(facts)

    def run(self) -> Described:
        for node, graph in in_order(self.facts.nodes()):
            if node not in self.absorbed_adds:
                self._node(node, graph)
            else:
                self.stated.add(node)
        self._anchor()
        values, operators = tuple(self.values), tuple(self.operators)
        stated = ChannelGraph(
            values, operators, self.anchors, stackable=True, regroupable=True,
            asked=frozenset(self._asked()),
        )  # fmt: skip
        return Described(stated, tuple(self.sites), tuple(self.numbers), self.facts)

    def _number(self, value: ir.Value) -> int:
        if value not in self.numbers:
            self.numbers[value] = len(self.values)
            dtype = self.facts.dtype(value)
            name = dtype.name if dtype is not None else "UNDEFINED"
            self.values.append(Value(value.name or "", self.facts.shape(value), name))
        return self.numbers[value]

    def _add(self, operator: Operator, site: Site) -> None:
        self.operators.append(operator)
        self.sites.append(site)

    def _node(self, node: ir.Node, graph: ir.Graph) -> None:
        if self._is_size(node):
            self.sizes.update(node.outputs)
            return
        if node in self.gelus:
            self._gelu(node)
            return
        before = len(self.operators)
        try:
            self._recognise(node, graph)
        except UncomputableError:  # a constant whose shape nothing states, and that can't be had
            self._other(node, graph)
        if len(self.operators) > before:
            self.stated.add(node)

    def _activations(self, node: ir.Node) -> list[ir.Value]:
        """What ``node`` reads that is not constant."""
        is_constant = self.facts.constants.is_constant
        return [v for v in node.inputs if v is not None and not is_constant(v)]

    def _is_size(self, node: ir.Node) -> bool:
        """Whether ``node`` reads no activation: sizes, and what is computed from sizes alone."""
        if node.op_type in ("Shape", "Size"):
            return self.facts.is_plain(node)
        read = self._activations(node)
        return bool(read) and self.sizes.issuperset(read) and not any(bodies(node))

    def _recognise(self, node: ir.Node, graph: ir.Graph) -> None:
        if node.outputs and all(self.facts.constants.is_constant(v) for v in node.outputs):
            self._constant(node, graph)
        elif (linear := find_linear(self.facts, node, graph)) is not None:
            self._linear(linear)
        elif (step := find_step(self.facts, node, graph)) is not None:
            self._step(step)
        else:
            self._other(node, graph)

    def _linear(self, found: FoundLinear[LinearSite]) -> None:
        site = found.site
        if site.add is not None:
            self.absorbed_adds.add(site.add)
        weight = site.node.inputs[site.weight_input]
        quantised = self.facts.quantised_weight(weight)
        held = weight if quantised is None else quantised.integers
        constant = self.facts.constants.is_constant(held)
        readers = self._readers_of(held) if constant and held else ()
        self._add(as_operator(self.facts, found, self._number, readers), site)

    def _step(self, found: FoundStep[StepSite]) -> None:
        node = found.site.node
        data = node.inputs[found.site.data_input]
        assert data is not None
        is_constant, position = self.facts.constants.is_constant, found.site.data_input
        read = [v for i, v in enumerate(node.inputs) if i != position and v is not None]
        others = [v for v in read if not is_constant(v)]
        operator = Affine(
            name=self.facts.label(node), op_type=node.op_type,
            inputs=(self._number(data), *(self._number(v) for v in others)),
            outputs=tuple(self._number(v) for v in node.outputs if v.name),
            axis=found.axis, map=found.map, form=found.form,
            training_mode=found.training_mode, unproved=found.unproved,
            alternatives=alternatives(self.facts, found.site),
        )  # fmt: skip
        self._add(operator, found.site)

    def _constant(self, node: ir.Node, graph: ir.Graph) -> None:
        constants = self.facts.constants
        if node.op_type not in _CONSTANT_STEPS or not constants.is_float(node.outputs[0]):
            return
        if _bytes(self.facts, node.outputs[0]) > max(
            _EVALUATED_BYTES, stored_bytes(constants.root(node.outputs[0]))
        ):
            return  # evaluating it would make the file larger
        outputs = tuple(self._number(v) for v in node.outputs)
        step = ConstantStep(name=self.facts.label(node), op_type=node.op_type, inputs=(),
                            outputs=outputs)  # fmt: skip
        self._add(step, ConstantSite(node, graph))

    def _gelu(self, node: ir.Node) -> None:
        """All of a GELU is one operator, where its last node stands."""
        self.stated.add(node)
        gelu = self.gelus[node]
        if node is gelu.nodes[-1]:
            whole = Opaque(
                name=self.facts.label(node), op_type="Gelu",
                inputs=(self._number(gelu.source),), outputs=(self._number(node.outputs[0]),),
            )  # fmt: skip
            self._add(whole, None)

    def _other(self, node: ir.Node, graph: ir.Graph) -> None:
        stated = find_tie(self.facts, node, graph, self._number, self._readers_of)
        if stated is None:
            stated = Opaque(
                name=self.facts.label(node), op_type=node.op_type,
                inputs=tuple(self._number(v) for v in self._activations(node)),
                outputs=tuple(self._number(v) for v in node.outputs if v.name),
            )  # fmt: skip
        site: Site = None
        if isinstance(stated, Norm):
            site = NormSite(node, graph)
        elif isinstance(stated, Tie) and stated.fill is not None:
            site = PadSite(node, graph, stated.fill)
        self._add(stated, site)

    def _readers_of(self, constant: ir.Value) -> tuple[str, ...]:
        """The operators that read the storage of ``constant``, by name."""
        return tuple(self.readers.get(self.facts.constants.root(constant), ()))

    def _anchor(self) -> None:
        for graph in self.facts.constants.graphs:
            for value in graph.inputs:
                self._pin(value, Anchor.INPUT)
        for node, graph in self.facts.nodes():
            for read in node.inputs:
                if read is not None and read.graph is not graph:
                    self._pin(read, Anchor.CAPTURED)
        for graph in self.facts.constants.graphs:
            for value in graph.outputs:
                captured = value.graph is not graph
                self._pin(value, Anchor.CAPTURED if captured else Anchor.OUTPUT)

    def _asked(self) -> Iterator[int]:
        """Values that are read by nodes which are no operators: by Shape, Size and their kin.

        What asks for a type alone, on behalf of a constant that operators hold, goes with these.
        """
        for value, number in self.numbers.items():
            nodes = (use.node for use in value.uses())
            if any(node not in self.stated and not self._is_held(node) for node in nodes):
                yield number

    def _is_held(self, node: ir.Node) -> bool:
        """Whether ``node`` asks for a type, of which only operators read what comes of it."""
        left = [node] if node.op_type == "CastLike" else []
        is_constant = self.facts.constants.is_constant
        for each in left:
            if each not in self.stated and not all(is_constant(v) for v in each.outputs):
                return False
            if each not in self.stated:
                left += [use.node for output in each.outputs for use in output.uses()]
        return bool(left)

    def _pin(self, value: ir.Value, anchor: Anchor) -> None:
        if value in self.numbers:
            self.anchors[self.numbers[value]] = anchor


def _storage_readers(facts: Facts) -> Mapping[ir.Value, list[str]]:
    """For each stored tensor, the operators that read it under whatever name."""
    constants = facts.constants
    readers: dict[ir.Value, list[str]] = {}

    def read(value: ir.Value | None, label: str) -> None:
        quantised = facts.quantised_weight(value)
        value = value if quantised is None else quantised.integers
        if value is not None and constants.is_constant(value):
            readers.setdefault(constants.root(value), []).append(label)

    def passes_on(value: ir.Value) -> bool:
        return constants.is_constant(value) or facts.quantised_weight(value) is not None

    for node, _ in facts.nodes():
        if all(passes_on(v) for v in node.outputs) and not any(bodies(node)):
            continue
        for value in node.inputs:
            read(value, facts.label(node))
    for graph in constants.graphs:
        for value in graph.outputs:
            read(value, f"output '{value.name}'")
    return readers


def _bytes(facts: Facts, value: ir.Value) -> int:
    dtype = facts.constants.dtype(value)
    return prod(facts.constants.shape(value)) * (4 if dtype is None else int(dtype.itemsize))
