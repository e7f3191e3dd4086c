"""What random ONNX models in float64 are made with: a pool of live values, and what draws on it.

Every value carries its shape for two runs, which differ where an axis is a symbol: the batch, and
at times the space. The scales are hard: negative, zero and tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.nets import Array

DOUBLE = TensorProto.DOUBLE
OPSETS = (17, 17, 17, 13, 18, 20, 21, 23, 9)
Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Live:
    """A value of the pool, its shape in each of the two runs, and where its channels are."""

    name: str
    shapes: tuple[Shape, Shape]
    axis: int = 1

    @property
    def rank(self) -> int:
        return len(self.shapes[0])

    @property
    def channels(self) -> int:
        return self.shapes[0][self.axis]

    @property
    def spatial(self) -> range:
        """The axes after the channels; none of tokens."""
        return range(2, self.rank) if self.axis == 1 else range(0)

    def known(self, axis: int) -> bool:
        """Whether ``axis`` has one size in both runs."""
        return self.shapes[0][axis] == self.shapes[1][axis]

    def least(self, axis: int) -> int:
        return min(shape[axis] for shape in self.shapes)

    def sized(self, axis: int, change: Callable[[int], int]) -> Live:
        """The same with another size along ``axis``."""
        made = [(*s[:axis], change(s[axis]), *s[axis + 1 :]) for s in self.shapes]
        return replace(self, shapes=(made[0], made[1]))

    def without(self, axes: Sequence[int], *, keep: bool) -> Live:
        """The same with ``axes`` reduced to one entry, or gone."""
        made = []
        for shape in self.shapes:
            ones = tuple(1 if k in axes else size for k, size in enumerate(shape))
            made.append(ones if keep else tuple(d for k, d in enumerate(ones) if k not in axes))
        axis = self.axis if keep else self.axis - sum(k < self.axis for k in axes)
        return replace(self, shapes=(made[0], made[1]), axis=axis)


@dataclass(frozen=True, slots=True)
class Net:
    """A model, and how its inputs are drawn for each of the two runs."""

    proto: onnx.ModelProto
    inputs: dict[str, tuple[Shape, Shape] | None]
    seed: int

    def feeds(self, run: int) -> dict[str, Array]:
        """One array for each input: normal numbers, or one truth value."""
        rng = np.random.default_rng([self.seed, run])
        return {
            name: np.array(bool(run)) if shapes is None else rng.normal(size=shapes[run])
            for name, shapes in self.inputs.items()
        }


class Impossible(Exception):  # noqa: N818 - no error: the piece does not fit here
    """A piece does not fit the values there are."""


class Maker:
    """The model as far as it is made."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = self.pick(OPSETS)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.inputs: dict[str, tuple[Shape, Shape] | None] = {}
        self.shared: dict[Shape, str] = {}
        self.pool: list[Live] = []
        self.calm = self.chance()
        self.digits = 6
        self.count = 0

    # ---- drawing ----

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    def upto(self, highest: int, lowest: int = 1) -> int:
        return int(self.rng.integers(lowest, highest + 1))

    def live(self, fits: Callable[[Live], bool] = lambda _: True) -> Live:
        """A value of the pool, a recent one rather than an old one."""
        found = [v for v in self.pool if fits(v)]
        if not found:
            raise Impossible
        back = min(int(self.rng.geometric(0.6)), len(found))
        return found[-back]

    def affords(self, digits: int) -> bool:
        """Whether the net may lose so many digits more; float64 has some to spare, not all."""
        if digits > self.digits:
            return False
        self.digits -= digits
        return True

    def scales(self, size: int, *, zero: bool = True) -> Array:
        """Some negative, some zero, one tiny.

        In a calm net nothing is negative or zero, so that units can go far.
        """
        values = self.rng.normal(1, 0.5, size)
        if self.calm or self.chance(0.5):
            values = np.abs(values)
        values[np.abs(values) < 0.2] = 0.7
        if zero and not self.calm and self.chance(0.25):
            values[self.rng.random(size) < 0.4] = 0
        small = self.pick((3, 6))
        if self.chance(0.15) and self.affords(small):
            values[self.upto(size) - 1] = 10.0**-small * (1 if self.calm else -1)
        return values

    # ---- making ----

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def constant(self, values: Any, dtype: Any = np.float64) -> str:
        """An initializer, or a Constant node, or either behind an Identity."""
        array, name = np.asarray(values, dtype=dtype), self.fresh("c")
        if self.chance(0.9):
            self.constants[name] = array
        else:
            tensor = numpy_helper.from_array(array)
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return self.node("Identity", [name]) if self.chance(0.05) else name

    def ints(self, values: Any) -> str:
        return self.constant(values, np.int64)

    def node(self, op_type: str, inputs: Sequence[str], count: int = 1, **attributes: Any) -> Any:
        """The name of the node's output, or the names of its ``count`` outputs."""
        made = [self.fresh("v") for _ in range(count)]
        name = self.fresh(op_type.lower())
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=name, **attributes))
        return made[0] if count == 1 else made

    def with_ints(
        self, op_type: str, data: str, since: int, count: int = 1, /, **lists: Any
    ) -> Any:
        """Lists as inputs from version ``since``, in their order; as attributes before."""
        attributes = {k: v for k, v in lists.items() if not isinstance(v, list)}
        lists = {k: v for k, v in lists.items() if isinstance(v, list)}
        if self.opset < since:
            return self.node(op_type, [data], count, **lists, **attributes)
        given = [self.ints(v) for v in lists.values()]
        return self.node(op_type, [data, *given], count, **attributes)

    def weight(self, *shape: int) -> str:
        """A weight; at times one that another operator reads too."""
        if shape in self.shared and self.chance(0.3):
            name = self.shared[shape]
            return self.node("Identity", [name]) if self.chance(0.3) else name
        name = self.constant(self.rng.normal(0, max(1, *shape[1:]) ** -0.5, shape))
        self.shared[shape] = name
        return name

    def along(self, value: Live, values: Array, axis: int | None = None) -> str:
        """A constant along the channels of ``value`` (or another axis), as it may be written."""
        back = value.rank - (value.axis if axis is None else axis) - 1
        shape = [values.size, *[1] * back]
        if len(shape) < value.rank and self.chance(0.4):
            shape = [1] * (value.rank - len(shape)) + shape
        return self.constant(values.reshape(shape))

    def put(self, value: Live, name: str | None = None) -> Live:
        """``value`` into the pool, under the name that a node gave it."""
        made = value if name is None else replace(value, name=name)
        sizes = [int(np.prod(shape)) for shape in made.shapes]
        if max(sizes) > 6000 or min(sizes) == 0:
            raise Impossible
        self.pool.append(made)
        return made

    # ---- the whole ----

    def enter(self) -> None:
        """An input: images of one, two or three dimensions, tokens, or vectors."""
        channels, space = self.upto(8, 2), self.pick((0, 1, 2, 2, 2, 2, 3, -1))
        sizes = [self.upto(3 if space == 3 else 6, 3) for _ in range(abs(space))]
        batch = self.pick(((2, 3), (2, 3), (2, 2)))
        grown = [size + 1 for size in sizes] if self.chance(0.2) else sizes
        shapes = (batch[0], channels, *sizes), (batch[1], channels, *grown)
        if space < 0:
            shapes = (batch[0], *sizes, channels), (batch[1], *grown, channels)
        name = self.fresh("x")
        self.inputs[name] = shapes
        self.put(Live(name, shapes, 2 if space < 0 else 1))

    def extend(self, piece: Callable[[Maker], None]) -> None:
        """Append a piece; nothing of one that does not fit stays."""
        kept = len(self.nodes), dict(self.constants), dict(self.inputs), dict(self.shared)
        pool = list(self.pool)
        try:
            piece(self)
        except Impossible:
            del self.nodes[kept[0] :]
            self.constants, self.inputs, self.shared = kept[1], kept[2], kept[3]
            self.pool = pool

    def finish(self, seed: int) -> Net:
        """The model with some outputs, and without what leads to none of them."""
        self.rng = np.random.default_rng([seed, 1])
        read = {name for node in self.nodes for name in node.input}
        ends = [v for v in self.pool if v.name not in read and v.name not in self.inputs]
        inner = [v for v in self.pool if v.name in read and v.name not in self.inputs]
        outputs = [v for v in ends if v is ends[-1] or self.chance(0.4)]
        outputs += [self.pick(inner)] if inner and self.chance(0.3) else []
        if not outputs:
            value = self.pool[-1]
            outputs = [replace(value, name=self.node("Identity", [value.name]))]
        self._drop_dead({v.name for v in outputs})
        return Net(self._proto(outputs), self.inputs, seed)

    def _drop_dead(self, wanted: set[str]) -> None:
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted |= {*node.input, *_captured(node)}
        self.nodes = kept[::-1]
        self.constants = {k: v for k, v in self.constants.items() if k in wanted}

    def _proto(self, outputs: Sequence[Live]) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(n, TensorProto.BOOL, []) if s is None else _info(n, s)
            for n, s in self.inputs.items()
        ]
        graph = helper.make_graph(
            self.nodes, "net", inputs,
            [_info(v.name, v.shapes, known=self.chance(0.7)) for v in outputs],
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )  # fmt: skip
        version = 8 if self.opset < 21 else 10
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=version)


def _info(name: str, shapes: tuple[Shape, Shape], *, known: bool = True) -> onnx.ValueInfoProto:
    dims: list[int | str] = [
        a if a == b and known else f"{name}_{axis}"
        for axis, (a, b) in enumerate(zip(*shapes, strict=True))
    ]
    return helper.make_tensor_value_info(name, DOUBLE, dims)


def _captured(node: onnx.NodeProto) -> set[str]:
    return {name for a in node.attribute for inner in a.g.node for name in inner.input}
