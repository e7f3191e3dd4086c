"""Channel graphs to test planners on: made by hand or at random, and run in float64.

Every value has the shape (1, channels, positions), so that a unit that leaks from one position
to another is seen. A linear operator has a kernel of two positions: it wraps around, or pads with
a zero when it has a shift barrier, and then the shift that a planner moved through it is wrong
where it must be wrong: the bias gets all taps, the border does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import (
    Affine,
    Anchor,
    Bias,
    ChannelGraph,
    Form,
    Linear,
    Norm,
    Opaque,
    Operator,
    Product,
    Route,
    ShiftRule,
    Sign,
    Sum,
    Tie,
    Value,
    ValueId,
    Weight,
)
from bnfold.index_maps import along, broadcast, permuted, reshaped, same_axes
from bnfold.planning import Plan

Kernel = Callable[..., F64 | tuple[F64, ...]]
Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Net:
    """A channel graph and what its operators compute.

    ``kernels`` compute the operators that are no Linear and no open Affine; ``weights`` (by
    storage, (out, in, 2)) and ``biases`` (by operator) belong to the linear ones.
    """

    graph: ChannelGraph
    kernels: Mapping[int, Kernel]
    weights: Mapping[str, F64]
    biases: Mapping[int, F64]
    shapes: Mapping[ValueId, Shape]

    @property
    def steps(self) -> dict[int, Affine]:
        """The affine steps by index."""
        return {i: op for i, op in enumerate(self.graph.operators) if isinstance(op, Affine)}

    def cost(self, step: int) -> int:
        """The bytes that a step writes."""
        return 4 * int(np.prod(self.shapes[self.graph.operators[step].outputs[0]]))

    def left(self, plan: Plan) -> int:
        """What the steps that a plan keeps cost."""
        return sum(self.cost(kept.step) for kept in plan.kept)


# ---- building ----


@dataclass(slots=True)
class Builder:
    """Adds operators one by one; every method returns the value it writes."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    shapes: dict[ValueId, Shape] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    kernels: dict[int, Kernel] = field(default_factory=dict)
    weights: dict[str, F64] = field(default_factory=dict)
    biases: dict[int, F64] = field(default_factory=dict)
    anchors: dict[ValueId, Anchor] = field(default_factory=dict)

    def input(self, channels: int = 2, positions: int = 2) -> ValueId:
        value = self._value((1, channels, positions))
        self.anchors[value] = Anchor.INPUT
        return value

    def linear(
        self, x: ValueId, out: int = 2, *, axis: int = 1, storage: str = "", **facts: object
    ) -> ValueId:
        shape, index = list(self.shapes[x]), len(self.operators)
        size, shape[axis] = shape[axis], out
        storage = storage or f"w{index}"
        self.weights.setdefault(storage, self.rng.normal(size=(out, size, 2)))
        self.biases[index] = self.rng.normal(size=out)
        weight = Weight(storage, "FLOAT", (), nbytes=8 * out * size)
        stated = {"in_axis": axis, "out_axis": axis, "in_channels": size, "out_channels": out,
                  "weight": weight, "bias": Bias.BUILT_IN}  # fmt: skip
        return self._add(Linear, "Conv", (x,), [shape], None, **stated | facts)[0]

    def padded(self, x: ValueId, out: int = 2) -> ValueId:
        return self.linear(x, out, shift_barrier="it pads with zeros")

    def step(
        self, x: ValueId, taken: AffineMap, form: Form = Form.BOTH, axis: int | None = 1
    ) -> ValueId:
        facts = {"axis": axis, "map": taken, "form": form}
        return self._add(Affine, "BatchNormalization", (x,), [self.shapes[x]], None, **facts)[0]

    def closed_step(self, x: ValueId, taken: AffineMap, **facts: object) -> ValueId:
        """A step that must not be touched, whatever it does."""
        stated = {"axis": 1, "map": None, "form": Form.BOTH} | facts
        kernel = lambda v: taken.apply(v, 1)  # noqa: E731
        return self._add(Affine, "Closed", (x,), [self.shapes[x]], kernel, **stated)[0]

    def norm(self, x: ValueId) -> ValueId:
        shape = self.shapes[x]
        facts = {"axis": 1, "channels": shape[1], "weight": Weight("n", "FLOAT", ("n",)),
                 "bias": Bias.BUILT_IN}  # fmt: skip
        return self._add(Norm, "LayerNormalization", (x,), [shape], _normed, **facts)[0]

    def opaque(self, *inputs: ValueId) -> ValueId:
        kernel = lambda *v: np.tanh(sum(e.mean(axis=2, keepdims=True) for e in v) + v[0])  # noqa: E731
        return self._add(Opaque, "Tanh", inputs, [self.shapes[inputs[0]]], kernel)[0]

    def relu(self, x: ValueId) -> ValueId:
        return self._tie("Relu", x, _relu, Sign.POSITIVE, ShiftRule.ZERO)

    def identity(self, x: ValueId) -> ValueId:
        return self._tie("Identity", x, np.positive, Sign.ANY, ShiftRule.EQUAL)

    def max_pool(self, x: ValueId) -> ValueId:
        kernel = lambda v: np.maximum(v, np.roll(v, 1, axis=2))  # noqa: E731
        return self._over(x, "MaxPool", kernel, Sign.POSITIVE, ShiftRule.EQUAL)

    def average_pool(self, x: ValueId) -> ValueId:
        kernel = lambda v: (v + np.roll(v, 1, axis=2)) / 2  # noqa: E731
        return self._over(x, "AveragePool", kernel, Sign.ANY, ShiftRule.EQUAL)

    def global_average(self, x: ValueId) -> ValueId:
        kernel = lambda v: v.mean(axis=2, keepdims=True)  # noqa: E731
        return self._over(x, "GlobalAveragePool", kernel, Sign.ANY, ShiftRule.EQUAL, positions=1)

    def pad(self, x: ValueId) -> ValueId:
        kernel = lambda v: np.pad(v, ((0, 0), (0, 0), (0, 1)))  # noqa: E731
        more = self.shapes[x][2] + 1
        return self._over(x, "Pad", kernel, Sign.ANY, ShiftRule.ZERO, positions=more)

    def pad_channels(self, x: ValueId) -> ValueId:
        """One channel of zeros before the others: no route reaches it."""
        _, channels, positions = self.shapes[x]
        kernel = lambda v: np.pad(v, ((0, 0), (1, 0), (0, 0)))  # noqa: E731
        links = along(3, 1, target=np.arange(channels) + 1)
        shape = (1, channels + 1, positions)
        return self._moved("Pad", x, [shape], [links], kernel, ShiftRule.ZERO)[0]

    def gather(self, x: ValueId, index: Sequence[int]) -> ValueId:
        links = along(3, 1, source=index, target=np.arange(len(index)))
        shape = (1, len(index), self.shapes[x][2])
        return self._moved("Gather", x, [shape], [links], lambda v: v[:, list(index)])[0]

    def split(self, x: ValueId, at: int) -> tuple[ValueId, ...]:
        _, channels, positions = self.shapes[x]
        parts = (np.arange(at), np.arange(at, channels))
        shapes = [(1, len(part), positions) for part in parts]
        links = [along(3, 1, source=part) for part in parts]
        return self._moved("Split", x, shapes, links, lambda v: (v[:, :at], v[:, at:]))

    def flatten(self, x: ValueId) -> ValueId:
        shape = (1, self.shapes[x][1] * self.shapes[x][2], 1)
        links = reshaped(self.shapes[x], shape)
        return self._moved("Reshape", x, [shape], [links], lambda v: v.reshape(shape))[0]

    def transpose(self, x: ValueId) -> ValueId:
        _, channels, positions = self.shapes[x]
        kernel = lambda v: v.transpose(0, 2, 1)  # noqa: E731
        shape = (1, positions, channels)
        return self._moved("Transpose", x, [shape], [permuted((0, 2, 1))], kernel)[0]

    def concat(self, *inputs: ValueId) -> ValueId:
        sizes = [self.shapes[x][1] for x in inputs]
        out, routes = len(self.shapes), []
        for x, begin, size in zip(inputs, np.cumsum([0, *sizes]), sizes, strict=False):
            routes.append(Route(x, out, along(3, 1, target=np.arange(size) + begin)))
        shape = (1, sum(sizes), self.shapes[inputs[0]][2])
        kernel = lambda *v: np.concatenate(v, axis=1)  # noqa: E731
        facts = {"sign": Sign.ANY, "shift": ShiftRule.EQUAL, "routes": tuple(routes), "joins": 1}
        return self._add(Tie, "Concat", inputs, [shape], kernel, **facts)[0]

    def maximum(self, *inputs: ValueId) -> ValueId:
        kernel = lambda *v: np.max(v, axis=0)  # noqa: E731
        facts = {"sign": Sign.POSITIVE, "shift": ShiftRule.EQUAL}
        return self._add(Tie, "Max", inputs, [self.shapes[inputs[0]]], kernel, **facts)[0]

    def divide(self, x: ValueId, by: ValueId) -> ValueId:
        """A tie with an input on no route, which is in true units."""
        routes = (Route(x, len(self.shapes)),)
        facts = {"sign": Sign.ANY, "shift": ShiftRule.ZERO, "routes": routes}
        kernel = lambda v, w: v / (1 + w * w)  # noqa: E731
        return self._add(Tie, "Div", (x, by), [self.shapes[x]], kernel, **facts)[0]

    def sum(self, *inputs: ValueId, signs: Sequence[int] = ()) -> ValueId:
        signs = tuple(signs) or (1,) * len(inputs)
        kernel = lambda *v: sum(n * e for n, e in zip(signs, v, strict=True))  # noqa: E731
        routes, shape = self._broadcast(inputs)
        alike = len({self.shapes[x] for x in inputs}) == 1
        facts = {"signs": signs, "routes": () if alike else routes}
        return self._add(Sum, "Add", inputs, [shape], kernel, **facts)[0]

    def reduce_sum(self, x: ValueId) -> ValueId:
        _, channels, positions = self.shapes[x]
        routes = (Route(x, len(self.shapes), same_axes(3, (2,))),)
        kernel = lambda v: v.sum(axis=2, keepdims=True)  # noqa: E731
        facts = {"signs": (positions,), "routes": routes}
        return self._add(Sum, "ReduceSum", (x,), [(1, channels, 1)], kernel, **facts)[0]

    def product(self, one: ValueId, other: ValueId) -> ValueId:
        routes, shape = self._broadcast((one, other))
        return self._add(Product, "Mul", (one, other), [shape], np.multiply, routes=routes)[0]

    def done(self) -> Net:
        """The net; values that nobody reads are its outputs."""
        read = {v for op in self.operators for v in op.inputs}
        for value in self.shapes:
            if value not in read:
                self.anchors.setdefault(value, Anchor.OUTPUT)
        operators = tuple(_with_readers(op, self.operators) for op in self.operators)
        values = tuple(Value(f"v{v}", shape, "FLOAT") for v, shape in self.shapes.items())
        graph = ChannelGraph(values, operators, dict(self.anchors))
        return Net(graph, self.kernels, self.weights, self.biases, self.shapes)

    def _value(self, shape: Sequence[int]) -> ValueId:
        batch, channels, positions = shape
        self.shapes[len(self.shapes)] = (batch, channels, positions)
        return len(self.shapes) - 1

    def _add(
        self,
        kind: type[Operator],
        op_type: str,
        inputs: tuple[ValueId, ...],
        shapes: Sequence[Sequence[int]],
        kernel: Kernel | None,
        **facts: object,
    ) -> tuple[ValueId, ...]:
        index, outputs = len(self.operators), tuple(self._value(shape) for shape in shapes)
        if kernel is not None:
            self.kernels[index] = kernel
        named = {"name": f"{op_type.lower()}{index}", "op_type": op_type}
        stated = named | {"inputs": inputs, "outputs": outputs} | facts
        self.operators.append(kind(**stated))  # type: ignore[arg-type]
        return outputs

    def _tie(self, op_type: str, x: ValueId, kernel: Kernel, sign: Sign, shift: ShiftRule) -> int:
        return self._add(Tie, op_type, (x,), [self.shapes[x]], kernel, sign=sign, shift=shift)[0]

    def _over(
        self, x: ValueId, op_type: str, kernel: Kernel, sign: Sign, shift: ShiftRule,
        positions: int = 0,
    ) -> ValueId:  # fmt: skip
        """A tie that mixes positions, which are therefore in no link."""
        batch, channels, before = self.shapes[x]
        routes = (Route(x, len(self.shapes), same_axes(3, (2,))),)
        facts = {"sign": sign, "shift": shift, "routes": routes}
        shape = (batch, channels, positions or before)
        return self._add(Tie, op_type, (x,), [shape], kernel, **facts)[0]

    def _moved(
        self, op_type: str, x: ValueId, shapes: Sequence[Shape], links: Sequence[object],
        kernel: Kernel, shift: ShiftRule = ShiftRule.EQUAL,
    ) -> tuple[ValueId, ...]:  # fmt: skip
        """A tie that moves elements about, with one route to each output."""
        first = len(self.shapes)
        routes = tuple(Route(x, first + k, link) for k, link in enumerate(links))  # type: ignore[arg-type]
        facts = {"sign": Sign.ANY, "shift": shift, "routes": routes}
        return self._add(Tie, op_type, (x,), shapes, kernel, **facts)

    def _broadcast(self, inputs: Sequence[ValueId]) -> tuple[tuple[Route, ...], Shape]:
        batch, channels, positions = np.broadcast_shapes(*(self.shapes[x] for x in inputs))
        shape, out = (batch, channels, positions), len(self.shapes)
        return tuple(Route(x, out, broadcast(self.shapes[x], shape)) for x in inputs), shape


def _with_readers(operator: Operator, operators: Sequence[Operator]) -> Operator:
    """State who reads the same weight, which is known only when all are there."""
    if not isinstance(operator, Linear) or operator.weight is None:
        return operator
    storage = operator.weight.storage
    linears = [op for op in operators if isinstance(op, Linear) and op.weight is not None]
    readers = tuple(op.name for op in linears if op.weight and op.weight.storage == storage)
    return replace(operator, weight=replace(operator.weight, readers=readers))


def _relu(x: F64) -> F64:
    return np.maximum(x, 0)


def _normed(x: F64) -> F64:
    deviation = np.sqrt(1 + x.var(axis=1, keepdims=True))
    return np.asarray((x - x.mean(axis=1, keepdims=True)) / deviation)
