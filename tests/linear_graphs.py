"""Channel graphs of linear operators with their positions: made by hand, run in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bnfold.affine import F64, AffineMap
from bnfold.channel_graph import (
    POINT,
    Affine,
    Anchor,
    Bias,
    ChannelGraph,
    Form,
    Linear,
    Opaque,
    Operator,
    Route,
    ShiftRule,
    Sign,
    Sum,
    Taps,
    Tie,
    Value,
    ValueId,
    Weight,
)
from bnfold.index_maps import same_axes
from bnfold.kernels import Kernel
from bnfold.merged import merged_kernel
from bnfold.planning import Merge
from tests.kernel_runs import made, random_kernel, run


@dataclass(slots=True)
class Net:
    """Adds operators one by one; every method returns the value that it writes."""

    dtype: str = "FLOAT"
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    kernels: dict[int, Kernel] = field(default_factory=dict)
    anchors: dict[ValueId, Anchor] = field(default_factory=dict)
    dtypes: dict[ValueId, str] = field(default_factory=dict)
    symmetric: bool = False

    # ---- making ----

    def input(self, channels: int = 4, *sizes: int) -> ValueId:
        """(2, channels, 8, 8) unless other sizes are given."""
        value = self._value((2, channels, *(sizes or (8, 8))))
        self.anchors[value] = Anchor.INPUT
        return value

    def conv(
        self, x: ValueId, out: int = 0, *taps: Taps, groups: int = 1, bias: bool = True,
        place: Bias = Bias.BUILT_IN, **facts: object,
    ) -> ValueId:  # fmt: skip
        """A convolution; a point on all axes unless ``taps`` say more."""
        index, ins = len(self.operators), self.shapes[x][1]
        window = taps or (POINT,) * (len(self.shapes[x]) - 2)
        kernel = random_kernel(self.rng, ins, out or ins, window, groups, biased=bias)
        self.kernels[index] = kernel
        name = f"conv{index}"
        nbytes = 4 * kernel.weight.size
        padded = any(t.begin > 0 or t.end > 0 for t in window)
        stated = {
            "in_axis": 1, "out_axis": 1, "in_channels": ins, "out_channels": out or ins,
            "weight": Weight(f"w{index}", self.dtype, (name,), nbytes), "bias": place,
            "groups": groups, "taps": window, "biased": bias,
            "shift_barrier": "it pads with zeros" if padded else "",
        }  # fmt: skip
        return self._add(Linear, name, (x,), self._read(x, kernel), **stated | facts)

    def step(self, x: ValueId, taken: AffineMap | None = None, **facts: object) -> ValueId:
        """A BatchNorm with negative and tiny scales unless another map is given."""
        channels = self.shapes[x][1]
        scale = self.rng.normal(size=channels)
        scale[0] = -abs(scale[0])
        own = AffineMap.of(scale, self.rng.normal(size=channels)) if taken is None else taken
        stated = {"axis": 1, "map": own, "form": Form.BOTH}
        name = f"bn{len(self.operators)}"
        return self._add(Affine, name, (x,), self.shapes[x], **stated | facts)

    def sum(self, *inputs: ValueId, signs: Sequence[int] = ()) -> ValueId:
        signs = tuple(signs) or (1,) * len(inputs)
        return self._add(
            Sum, f"sum{len(self.operators)}", inputs, self.shapes[inputs[0]], signs=signs
        )

    def pool(self, x: ValueId, *taps: Taps, exact: bool = True) -> ValueId:
        """An average; ``exact`` where it divides by the same number everywhere."""
        kernel = Kernel.constant(self.shapes[x][1], taps)
        links = same_axes(2 + len(taps), tuple(range(2, 2 + len(taps))))
        facts = {"sign": Sign.ANY, "shift": ShiftRule.ZERO, "taps": taps if exact else None,
                 "routes": (Route(x, len(self.shapes), links),)}  # fmt: skip
        self.kernels[len(self.operators)] = kernel
        return self._add(Tie, f"pool{len(self.operators)}", (x,), self._read(x, kernel), **facts)

    def identity(self, x: ValueId) -> ValueId:
        name = f"identity{len(self.operators)}"
        return self._add(Tie, name, (x,), self.shapes[x], sign=Sign.ANY, shift=ShiftRule.EQUAL)

    def relu(self, x: ValueId) -> ValueId:
        name = f"relu{len(self.operators)}"
        return self._add(Tie, name, (x,), self.shapes[x], sign=Sign.POSITIVE, shift=ShiftRule.ZERO)

    def opaque(self, x: ValueId) -> ValueId:
        return self._add(Opaque, f"opaque{len(self.operators)}", (x,), self.shapes[x])

    def graph(self) -> ChannelGraph:
        """What was made; values that nobody reads are its outputs."""
        read = {v for operator in self.operators for v in operator.inputs}
        ends = {v: Anchor.OUTPUT for v in range(len(self.shapes)) if v not in read}
        values = tuple(
            Value(f"v{k}", shape, self.dtypes.get(k, self.dtype))
            for k, shape in enumerate(self.shapes)
        )
        return ChannelGraph(
            values, tuple(self.operators), ends | self.anchors, self.symmetric, regroupable=True
        )

    def _value(self, shape: Sequence[int]) -> ValueId:
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def _read(self, x: ValueId, kernel: Kernel) -> tuple[int, ...]:
        shape = self.shapes[x]
        sizes = (made(size, taps) for size, taps in zip(shape[2:], kernel.taps, strict=True))
        return (shape[0], kernel.outs, *sizes)

    def _add(
        self, kind: type[Operator], name: str, inputs: tuple[ValueId, ...], shape: Sequence[int],
        **facts: object,
    ) -> ValueId:  # fmt: skip
        out = self._value(shape)
        stated = {"name": name, "op_type": kind.__name__, "inputs": inputs, "outputs": (out,)}
        self.operators.append(kind(**stated | facts))  # type: ignore[arg-type]
        return out

    # ---- running ----

    def values(self) -> dict[ValueId, F64]:
        """All values, from random inputs, operator by operator."""
        found: dict[ValueId, F64] = {}
        for value, anchor in self.anchors.items():
            if anchor is Anchor.INPUT:
                found[value] = self.rng.normal(size=self.shapes[value])
        for index, operator in enumerate(self.operators):
            given = [found[value] for value in operator.inputs]
            found[operator.outputs[0]] = self._run(index, operator, given)
        return found

    def _run(self, index: int, operator: Operator, given: list[F64]) -> F64:
        if index in self.kernels:
            return run(self.kernels[index], given[0])
        if isinstance(operator, Affine):
            assert operator.map is not None
            return operator.map.apply(given[0], 1)
        if isinstance(operator, Sum):
            return np.asarray(sum(s * v for s, v in zip(operator.signs, given, strict=True)))
        free = isinstance(operator, Tie) and operator.free
        return given[0] if free else np.maximum(given[0], 0)

    def merged(self, merge: Merge) -> Kernel:
        """The numbers of what became one."""
        return merged_kernel(self.graph(), merge, self.kernels.__getitem__)
