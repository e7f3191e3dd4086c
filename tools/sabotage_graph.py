"""Editing ONNX models in place, and what an edit does to the outputs in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.random import Generator
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bnfold.verify.oracle import Oracle

F64 = NDArray[np.float64]
Feed = dict[str, NDArray[Any]]
T = TypeVar("T")

FLOATS = {onnx.TensorProto.FLOAT: 24, onnx.TensorProto.FLOAT16: 11,
          onnx.TensorProto.BFLOAT16: 8, onnx.TensorProto.DOUBLE: 53}  # fmt: skip
# Axes of output and input channels of a weight; MatMul and Gemm are said where they are read.
AXES = {"Conv": (0, 1), "ConvTranspose": (1, 0)}
OPEN_SIZE = {0: 2}  # a batch of two; other open sizes are taken from here or are 32


class NoSiteError(Exception):
    """The model has no place where this defect could be planted."""


@dataclass(frozen=True, slots=True)
class Linear:
    """An operator with a constant weight that nobody else reads.

    Attributes:
        node: The operator.
        weight: Name of its weight.
        bias: Name of its bias, its own or the constant of the Add behind it; empty without one.
        out_axis: The weight's axis of output channels.
        in_axis: The weight's axis of input channels (of one group).
        groups: How many groups.
    """

    node: onnx.NodeProto
    weight: str
    bias: str
    out_axis: int
    in_axis: int
    groups: int


class Draft:
    """A copy of a model to be changed.

    Args:
        model: The model, weights inside; it is left as it is.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self._stored = {tensor.name: tensor for tensor in self.graph.initializer}

    # ---- constants ----

    def holds(self, name: str) -> bool:
        """Whether ``name`` is a float initializer."""
        return name in self._stored and self._stored[name].data_type in FLOATS

    def array(self, name: str) -> F64:
        """An initializer in float64."""
        array: F64 = numpy_helper.to_array(self._stored[name]).astype(np.float64)
        return array

    def store(self, name: str, array: NDArray[Any], like: int = onnx.TensorProto.FLOAT) -> None:
        """Sets an initializer, rounded to the type that it has, or ``like`` if it is new."""
        tensor = self._stored.get(name)
        kind = like if tensor is None else tensor.data_type
        rounded = np.asarray(array).astype(helper.tensor_dtype_to_np_dtype(kind))
        made = numpy_helper.from_array(rounded, name)
        if tensor is None:
            self._stored[name] = self.graph.initializer.add()
            tensor = self._stored[name]
        if tensor.dims != made.dims:
            self._forget_shape(name)
        tensor.CopyFrom(made)

    def _forget_shape(self, name: str) -> None:
        for place, value in reversed([*enumerate(self.graph.value_info)]):
            if value.name == name:
                del self.graph.value_info[place]

    def floats(self) -> list[str]:
        """Names of the float initializers that hold more than one number."""
        return [n for n, t in self._stored.items() if self.holds(n) and np.prod(t.dims) > 1]

    # ---- nodes ----

    def readers(self) -> Counter[str]:
        """How often each value is read, by nodes of all levels and as a graph output."""
        found = Counter(name for node in all_nodes(self.graph) for name in node.input)
        found.update(value.name for value in self.graph.output)
        return found

    def makers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each value."""
        return {name: node for node in self.graph.node for name in node.output if name}

    def outputs(self) -> set[str]:
        """Names of the graph's outputs."""
        return {value.name for value in self.graph.output}

    def inner(self, *kinds: str) -> list[onnx.NodeProto]:
        """Nodes of these types whose first output is no graph output."""
        ends = self.outputs()
        return [n for n in self.graph.node if n.op_type in kinds and n.output[0] not in ends]

    def redirect(self, old: str, new: str) -> None:
        """Whoever reads ``old`` reads ``new``."""
        for node in all_nodes(self.graph):
            node.input[:] = [new if name == old else name for name in node.input]

    def remove(self, node: onnx.NodeProto) -> None:
        """Takes a node away."""
        place = self.index(node)
        self.reorder([other for i, other in enumerate(self.graph.node) if i != place])

    def reorder(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Sets the list of nodes."""
        copies = [copied(node) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)

    def index(self, node: onnx.NodeProto) -> int:
        """Where a node stands; known by what it makes, which no other node does."""
        made = next(filter(None, node.output))
        return next(i for i, other in enumerate(self.graph.node) if made in other.output)

    def linears(self) -> list[Linear]:
        """All linear operators whose weight is their own."""
        reads = self.readers()
        return [
            self._linear(node, reads)
            for node in self.graph.node
            if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
            and self.holds(node.input[1])
            and reads[node.input[1]] == 1
        ]

    def _linear(self, node: onnx.NodeProto, reads: Counter[str]) -> Linear:
        rank = self.array(node.input[1]).ndim
        axes = AXES.get(node.op_type, (rank - 1, rank - 2))
        if node.op_type == "Gemm" and attribute(node, "transB", 0):
            axes = (0, 1)
        bias = self._bias(node, reads)
        return Linear(node, node.input[1], bias, *axes, attribute(node, "group", 1))

    def _bias(self, node: onnx.NodeProto, reads: Counter[str]) -> str:
        if len(node.input) > 2 and self.holds(node.input[2]):
            return str(node.input[2]) if reads[node.input[2]] == 1 else ""
        made = node.output[0]
        for reader in self.graph.node:
            if reader.op_type == "Add" and made in reader.input and reads[made] == 1:
                other = next(name for name in reader.input if name != made)
                return other if self.holds(other) and reads[other] == 1 else ""
        return ""


def copied(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy that outlives the graph that the node is in."""
    again = onnx.NodeProto()
    again.CopyFrom(node)
    return again


def attribute(node: onnx.NodeProto, name: str, default: T) -> T:
    """An attribute's value, or ``default``."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def label(node: onnx.NodeProto) -> str:
    """Type and name, or first output where the node has no name."""
    return f"{node.op_type} '{node.name or node.output[0]}'"


def pick(rng: Generator, sites: Sequence[T]) -> T:
    """One of them at random.

    Raises:
        NoSiteError: There is none.
    """
    if not sites:
        raise NoSiteError("no such site")
    return sites[int(rng.integers(len(sites)))]


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for held in node.attribute:
            for inner in (held.g, *held.graphs):
                yield from all_nodes(inner)


# ---- what an edit does ----


def sample(model: onnx.ModelProto, seed: int) -> Feed:
    """One input for every graph input that has no initializer; an open batch is 2."""
    rng = np.random.default_rng(seed)
    stored = {tensor.name for tensor in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value or OPEN_SIZE.get(i, 32) for i, d in enumerate(kind.shape.dim)]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        drawn = rng.standard_normal(shape) if kind.elem_type in FLOATS else np.zeros(shape)
        feed[value.name] = drawn.astype(dtype)
    return feed


def outputs(model: onnx.ModelProto, feed: Feed) -> list[F64]:
    """The model's float outputs in float64."""
    found = Oracle(model).run(feed).values()
    return [np.asarray(value, dtype=np.float64) for value in found if value.dtype.kind == "f"]


def distance(one: Sequence[F64], other: Sequence[F64]) -> float:
    """The largest relative distance of any output; infinite where shapes or NaNs differ."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or not np.isfinite(b).all():
            return float("inf")
        size = float(np.linalg.norm(a))
        worst = max(worst, float(np.linalg.norm(b - a)) / (size or 1.0))
    return worst


def jiggled(model: onnx.ModelProto, names: Sequence[str], rng: Generator) -> onnx.ModelProto:
    """The model with each number of these initializers moved by half an ulp, up or down.

    It is stored in float64, since in its own type half an ulp is nothing.
    """
    draft = Draft(model)
    wanted = set(names)
    for tensor in draft.graph.initializer:
        if tensor.name in wanted and draft.holds(tensor.name):
            array = draft.array(tensor.name)
            half = 2.0 ** -FLOATS[tensor.data_type]
            moved = array * (1 + half * rng.choice((-1.0, 1.0), array.shape))
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    return draft.model


def changed(one: onnx.ModelProto, other: onnx.ModelProto) -> list[str]:
    """Names of the initializers of ``one`` that ``other`` lacks or has otherwise."""
    held = {tensor.name: tensor.SerializeToString() for tensor in other.graph.initializer}
    return [t.name for t in one.graph.initializer if held.get(t.name) != t.SerializeToString()]
