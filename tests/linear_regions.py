"""Random ONNX models in float64 that are mostly linear: branches, sums and chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.nets import Array

DOUBLE = TensorProto.DOUBLE


@dataclass(frozen=True, slots=True)
class Live:
    """A value and its shape: (batch, channels, *positions), or with the channels last."""

    name: str
    channels: int
    sizes: tuple[int, ...]


@dataclass(slots=True)
class Regions:
    """A model in the making. ``axes`` is the number of spatial axes; 0 makes MatMul and Gemm."""

    rng: np.random.Generator
    axes: int
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    pool: list[Live] = field(default_factory=list)
    ends: list[Live] = field(default_factory=list)
    tokens: bool = False

    # ---- drawing ----

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    # ---- making ----

    def constant(self, *shape: int, values: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = self.rng.normal(size=shape) if values is None else np.asarray(values)
        return name

    def node(
        self, op: str, x: Sequence[str], channels: int, sizes: Sequence[int], **a: Any
    ) -> Live:
        if not 0 < channels * prod(sizes) <= 3000:
            raise ValueError("of no size that is of use")
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(x), [name], name=f"{op}{len(self.nodes)}", **a))
        return Live(name, channels, tuple(sizes))

    def along(self, x: Live) -> str:
        """A constant along the channels of ``x``, or one for all."""
        if self.chance(0.2):
            return self.constant()
        trailing = 0 if self.tokens or not self.axes else self.axes
        return self.constant(x.channels, *[1] * trailing)

    # ---- operators ----

    def conv(self, x: Live, out: int = 0, *, same: bool = False, stride: int = 0) -> Live:
        if not self.axes:
            return self.matmul(x, out)
        groups = self.pick([g for g in range(1, x.channels + 1) if x.channels % g == 0])
        out = out or groups * self.pick((1, 1, 2, 3))
        groups = groups if out % groups == 0 else 1
        kernel = [self.pick((1, 1, 3, 2) if not same else (1, 3, 1, 5)) for _ in x.sizes]
        dilations = [self.pick((1, 1, 1, 2)) for _ in x.sizes]
        extent = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        strides = [stride or self.pick((1, 1, 1, 2)) for _ in x.sizes]
        if same:
            pads = [e // 2 for e in extent] * 2
        else:
            pads = [self.pick((0, 0, 1, 2)) for _ in range(2 * len(kernel))]
        both = zip(x.sizes, extent, strides, pads, pads[len(kernel) :], strict=False)
        sizes = [(n + b + e - w - 1) // s + 1 for n, w, s, b, e in both]
        weight = self.constant(out, x.channels // groups, *kernel)
        inputs = [x.name, weight, *([self.constant(out)] if self.chance(0.4) else [])]
        return self.node("Conv", inputs, out, sizes, group=groups, pads=pads, strides=strides,
                         dilations=dilations)  # fmt: skip

    def matmul(self, x: Live, out: int = 0) -> Live:
        out = out or self.pick((1, 2, 4, 6))
        if not self.tokens and self.chance(0.4):
            flip = self.chance(0.5)
            weight = self.constant(*((out, x.channels) if flip else (x.channels, out)))
            bias = [self.constant(out)] if self.chance(0.5) else []
            return self.node("Gemm", [x.name, weight, *bias], out, x.sizes, transB=int(flip),
                             alpha=self.pick((1.0, 0.5)))  # fmt: skip
        weight = self.constant(x.channels, out)
        made = self.node("MatMul", [x.name, weight], out, x.sizes)
        return self.node("Add", [made.name, self.constant(out)], out, x.sizes) if (
            self.chance(0.4)
        ) else made  # fmt: skip

    def step(self, x: Live) -> Live:
        kind = self.pick(("BN", "BN", "Mul", "Add", "Neg", "Sub"))
        if kind == "Neg":
            return self.node("Neg", [x.name], x.channels, x.sizes)
        if kind != "BN" or self.tokens:
            kind = kind if kind != "BN" else "Mul"
            return self.node(kind, [x.name, self.along(x)], x.channels, x.sizes)
        shift, mean = self.rng.normal(size=(2, x.channels))
        shift, mean = (shift, mean) if self.chance(0.7) else (0 * shift, 0 * mean)
        given = [self.constant(x.channels), *(self.constant(values=v) for v in (shift, mean)),
                 self.constant(values=self.rng.uniform(0.3, 3, x.channels))]  # fmt: skip
        return self.node("BatchNormalization", [x.name, *given], x.channels, x.sizes)

    def pad(self, x: Live) -> Live:
        if not self.axes:
            return self.step(x)
        around = [self.pick((0, 0, 1, 2, -1)) for _ in range(2 * self.axes)]
        both = zip(x.sizes, around, around[self.axes :], strict=False)
        sizes = [n + b + e for n, b, e in both]
        if min(sizes) < 2:
            raise ValueError("nothing would be left")
        ends = self.constant(
            values=np.array([0, 0, *around[: self.axes], 0, 0, *around[self.axes :]])
        )
        return self.node("Pad", [x.name, ends], x.channels, sizes)

    def average(self, x: Live) -> Live:
        if not self.axes:
            return self.step(x)
        kernel = [self.pick((1, 2, 3)) for _ in x.sizes]
        strides = [self.pick((1, 1, 2)) for _ in x.sizes]
        pads = [self.pick((0, min(1, k - 1))) for k in kernel * 2]
        both = zip(x.sizes, kernel, strides, pads, pads[self.axes :], strict=False)
        sizes = [(n + b + e - k) // s + 1 for n, k, s, b, e in both]
        return self.node("AveragePool", [x.name], x.channels, sizes, kernel_shape=kernel, pads=pads,
                         strides=strides, count_include_pad=self.pick((0, 1)))  # fmt: skip

    def branches(self, x: Live) -> Live:
        """A sum of what is made of one tensor, as re-parameterised blocks have it."""
        out = self.pick((x.channels, x.channels, 2, 4))
        stride = self.pick((1, 1, 2)) if self.axes else 1
        made = [self.branch(x, out, stride) for _ in range(self.pick((2, 2, 3)))]
        if out == x.channels and stride == 1 and self.chance(0.6):
            made.append(self.step(x) if self.chance(0.6) else x)
        if self.chance(0.4):  # a term that is something else
            made.append(self.relu(made[0]))
        made = [made[i] for i in self.rng.permutation(len(made))]
        if self.chance(0.25) and len(made) > 2:
            return self.node("Sum", [v.name for v in made], out, made[0].sizes)
        return self.added(made)

    def branch(self, x: Live, out: int, stride: int) -> Live:
        made = self.conv(x, out, same=True, stride=stride)
        if self.chance(0.3):
            made = self.conv(made, out, same=True, stride=1)
        return self.step(made) if self.chance(0.6) else made

    def added(self, made: list[Live]) -> Live:
        total = made[0]
        for other in made[1:]:
            names = [total.name, other.name]
            if self.chance(0.3):
                names.reverse()
            total = self.node(self.pick(("Add", "Add", "Sub")), names, total.channels, total.sizes)
        return total

    def sum(self, x: Live) -> Live:
        """With another value of the same shape, a few steps back."""
        alike = [v for v in self.pool if (v.channels, v.sizes) == (x.channels, x.sizes)]
        return self.added([x, self.pick(alike)])

    def head(self, x: Live) -> Live:
        """Pooled, flattened in one of several ways, with operators on both sides; an end."""
        if not self.axes:
            return self.step(x)
        pooled = self.node("GlobalAveragePool", [x.name], x.channels, [1] * self.axes)
        made = self.step(self.conv_of_points(pooled)) if self.chance(0.8) else pooled
        kind = self.pick(("Flatten", "Reshape", "Squeeze"))
        listed = {"Flatten": [], "Reshape": [-1, made.channels],
                  "Squeeze": list(range(2, 2 + self.axes))}[kind]  # fmt: skip
        given = [self.constant(values=np.array(listed))] if listed else []
        flat = self.node(kind, [made.name, *given], made.channels, ())
        weight = self.constant(flat.channels, self.pick((1, 3, flat.channels)))
        out = self.constants[weight].shape[1]
        product = self.node(self.pick(("Gemm", "MatMul")), [flat.name, weight], out, ())
        alike = out == flat.channels and self.chance(0.5)
        self.ends.append(self.added([product, flat]) if alike else product)
        return self.step(x)

    def conv_of_points(self, x: Live) -> Live:
        out = self.pick((1, 2, 3, x.channels))
        weight = self.constant(out, x.channels, *[1] * self.axes)
        return self.node("Conv", [x.name, weight], out, x.sizes)

    def relu(self, x: Live) -> Live:
        return self.node("Relu", [x.name], x.channels, x.sizes)

    def identity(self, x: Live) -> Live:
        return self.node("Identity", [x.name], x.channels, x.sizes)

    # ---- the whole ----

    def grow(self) -> None:
        """One more operator, or a few that belong together; none where it does not fit."""
        kinds: list[Callable[[Live], Live]] = [
            self.conv, self.conv, self.step, self.branches, self.branches, self.sum, self.pad,
            self.average, self.identity, self.relu, self.head,
        ]  # fmt: skip
        nodes, constants, ends = len(self.nodes), len(self.constants), len(self.ends)
        try:
            back = min(int(self.rng.geometric(0.7)), len(self.pool))
            self.pool.append(self.pick(kinds)(self.pool[-back]))
        except ValueError:
            del self.nodes[nodes:], self.ends[ends:]
            for name in list(self.constants)[constants:]:
                del self.constants[name]

    def proto(self, x: Live, *, known: bool) -> onnx.ModelProto:
        read = {name for node in self.nodes for name in node.input}
        ends = [v for v in self.pool if v.name not in read] + self.ends or [self.pool[-1]]
        positions = [n if known else f"n{k}" for k, n in enumerate(x.sizes)]
        around = [*positions, x.channels] if self.tokens else [x.channels, *positions]
        given = helper.make_tensor_value_info("x", DOUBLE, ["N", *around])
        made = [
            helper.make_tensor_value_info(
                v.name, DOUBLE, [f"{v.name}_{k}" for k in range(2 + len(v.sizes))]
            )
            for v in ends
        ]
        stored = [numpy_helper.from_array(v, name) for name, v in self.constants.items()]
        graph = helper.make_graph(self.nodes, "regions", [given], made, stored)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def random_regions(seed: int, size: int) -> onnx.ModelProto:
    """A model of about ``size`` operators; its input ``x`` has a batch of its own."""
    rng = np.random.default_rng(seed)
    axes = int(rng.choice([0, 1, 1, 2, 2, 3]))
    made = Regions(rng, axes, int(rng.choice([13, 17, 21])))
    made.tokens = axes == 0 and made.chance(0.5)
    sizes = tuple(int(n) for n in rng.integers(4, 8 if axes < 3 else 6, axes))
    x = Live("x", int(rng.choice([1, 2, 3, 4, 6])), (3,) if made.tokens else sizes)
    made.pool.append(x)
    while len(made.nodes) < size:
        made.grow()
    return made.proto(x, known=made.chance(0.6))


def shape_of_input(proto: onnx.ModelProto, seed: int) -> tuple[int, ...]:
    """A shape that the input ``x`` of a random model may have."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    rng = np.random.default_rng(seed)
    return tuple(
        dim.dim_value or (2 if k == 0 else int(rng.integers(7, 10))) for k, dim in enumerate(dims)
    )
