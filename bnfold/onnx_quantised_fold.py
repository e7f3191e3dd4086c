"""What the constants behind DequantizeLinear become in a fold: arrays and tensors, no edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir

from bnfold.affine import cast_once, out_channels
from bnfold.folding import (
    FoldRefusedError,
    bias_stays_away,
    checked,
    folded_bias,
    scales,
    weight_changes,
)
from bnfold.layout import F64, Array
from bnfold.onnx_facts import Facts
from bnfold.onnx_fold import given_bias
from bnfold.onnx_linear import LinearSite, Slot, bias_value
from bnfold.onnx_quantised import Dequantised, activation_step
from bnfold.planning import Absorption, Reason
from bnfold.quantised import (
    Factor,
    Turned,
    UnnegatableError,
    factor,
    power,
    rounded_bias,
    scale_fault,
    steady,
    turned,
)

_LAZY_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedTensors:
    """The inputs of a DequantizeLinear; None for one that stays as it is.

    ``axis`` is the one along which its scale varies, None where there is a single scale.
    """

    axis: int | None
    integers: ir.TensorProtocol | None
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None = None


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedFold:
    """What a linear operator with a quantised weight holds after a fold; None where it stays.

    Attributes:
        weight: The inputs of the DequantizeLinear of its weight.
        bias: Floats, or the inputs of a DequantizeLinear.
    """

    weight: QuantisedTensors | None
    bias: Array | QuantisedTensors | None


def quantised_fold(
    facts: Facts, index: int, site: LinearSite, found: Dequantised, taken: Absorption, *, lazy: bool
) -> QuantisedFold:
    """The constants of linear operator ``index`` after the fold.

    Args:
        facts: Of the model.
        index: The index of the operator in the channel graph.
        site: The operator.
        found: What its weight is dequantised from.
        taken: What it takes over.
        lazy: Compute large integers only when they are read.

    Raises:
        FoldRefusedError: They do not fit their types, or lose what the unfolded ones said.
    """
    return _Fold(facts, index, site, found, taken).run(lazy)


class _Fold:
    def __init__(
        self, facts: Facts, index: int, site: LinearSite, found: Dequantised, taken: Absorption
    ) -> None:
        self.facts, self.index, self.site, self.found = facts, index, site, found
        self.taken, self.constants = taken, facts.constants
        self.data = site.node.inputs[site.data_input]
        self.factor = self._factor()
        # Beside a scale of 0 any other says the same, as the integers are the zero point.
        step = found.step(self.constants) * steady(self.factor.values)
        self.scale = self._fitting(step, self._dtype(found.scale))
        zero = found.zero(self.constants)
        self.zero = np.broadcast_to(zero, np.broadcast_shapes(zero.shape, step.shape))

    def run(self, lazy: bool) -> QuantisedFold:
        turn = self._turned()
        bias = self._bias(turn)
        if not weight_changes(self.taken):
            return QuantisedFold(None, bias)
        return QuantisedFold(self._weight(turn, lazy), bias)

    def _dtype(self, value: ir.Value) -> ir.DataType:
        dtype = self.constants.dtype(value)
        assert dtype is not None
        return dtype

    def _factor(self) -> Factor:
        output, inputs = scales(self.taken)
        layout, axis = self.site.layout, self.found.axis
        try:
            return factor(self.found.shape, layout, axis, output, inputs)
        except ValueError as error:
            raise FoldRefusedError(self.index, Reason.WEIGHT_TYPE, str(error)) from error

    def _fitting(self, wide: F64, dtype: ir.DataType) -> Array:
        """Scales, cast once."""
        made = cast_once(wide, dtype.numpy())
        if fault := scale_fault(wide, made):
            raise FoldRefusedError(self.index, Reason.RANGE, fault)
        return made

    # ---- the weight ----

    def _turned(self) -> Turned | None:
        """How the integers change; None where they do not."""
        if not (self.factor.values <= 0).any():
            return None
        info = ml_dtypes.iinfo(self.found.dtype.numpy())  # type: ignore[no-untyped-call]
        try:
            return turned(
                self.found.read(self.constants), self.factor.axis, self.zero, self.factor.values,
                (int(info.min), int(info.max)), keep_zero=self.facts.rounds_activations,
            )  # fmt: skip
        except UnnegatableError as error:
            met = f"its integers can't be negated on channel {error.entry}"
            raise FoldRefusedError(self.index, Reason.RANGE, met) from error

    def _weight(self, turn: Turned | None, lazy: bool) -> QuantisedTensors:
        found, axis = self.found, self.factor.axis
        same = axis == found.axis
        shape = self.constants.shape(found.scale) if same else (-1,)
        zero = self.zero if turn is None else turn.zero_point
        moved = bool((zero != self.zero).any())
        stays = not moved and (same or found.zero_point is None)
        return QuantisedTensors(
            None if axis is None else found.order[axis],
            None if turn is None or not turn.changes else self._integers(turn, lazy),
            ir.Tensor(self.scale.reshape(shape), dtype=self._dtype(found.scale)),
            None if stays else _tensor(zero.reshape(shape), found.dtype),
        )  # fmt: skip

    def _integers(self, turn: Turned, lazy: bool) -> ir.TensorProtocol:
        found, dtype = self.found, self.found.dtype
        compute = partial(_changed, self.constants.reader(found.integers), found, turn)
        if lazy and int(np.prod(found.shape)) * dtype.itemsize >= _LAZY_BYTES:
            shape = tuple(found.shape[k] for k in np.argsort(found.order))
            return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape))
        return compute()

    # ---- the bias ----

    def _bias(self, turn: Turned | None) -> Array | QuantisedTensors | None:
        given = bias_value(self.facts, self.site)
        if given is None and bias_stays_away(self.taken):
            return None
        own = self.facts.quantised_bias(given)
        wide = self._wide(given, own)
        if own is not None:
            dtype = self._dtype(own.scale)
            return self._rounded(wide, self._fitting(self._scaled(own), dtype), dtype, turn)
        step = self._accumulated() if given is None else None
        dtype = self._dtype(self.found.scale if given is None else given)
        if step is None:
            return checked(self.index, wide, dtype.numpy(), "the bias ")
        return self._rounded(wide, self._fitting(step, dtype), dtype, turn)

    def _wide(self, given: ir.Value | None, own: Dequantised | None) -> F64:
        """The bias after the fold, in float64."""
        channels = out_channels(self.found.shape, self.site.layout)
        if own is not None:
            before = np.broadcast_to(self.site.beta * own.array(self.constants), (channels,))
        else:
            before = given_bias(self.facts, self.site, given, channels)
        weight = None
        if self.taken.input is not None and not self.taken.input.is_scaling:
            weight = self.found.array(self.constants)
        return folded_bias(before, weight, self.site.layout, self.index, self.taken, np.float64,
                           self.site.alpha)  # fmt: skip

    def _per_output(self, values: F64) -> F64 | None:
        """What lies along the axis of the weight's scale, on each output channel."""
        if self.factor.axis is None:
            return values
        along = Factor(self.factor.axis, values)
        return along.per_output(self.found.shape, self.site.layout)

    def _scaled(self, own: Dequantised) -> F64:
        """The scale of a bias, multiplied by what the weight's is."""
        ratio = self._per_output(steady(self.factor.values))
        if ratio is None:
            output = self.taken.output
            ratio = np.ones(1) if output is None else steady(output.scale)
        return own.step(self.constants) * ratio

    def _accumulated(self) -> F64 | None:
        """The scale of the sums over integers, in which runtimes take a bias; None of floats."""
        step = activation_step(self.constants, self.data)
        if step is None or self.site.slot is not Slot.INPUT:
            return None
        weight = self._per_output(self.scale.astype(np.float64))
        return None if weight is None else step * weight

    def _rounded(
        self, wide: F64, step: Array, dtype: ir.DataType, turn: Turned | None
    ) -> QuantisedTensors:
        integers, zero = self.found.read(self.constants), self.zero
        if turn is not None:
            integers, zero = turn.of(integers), turn.zero_point
        size = power(integers, zero, self.factor.axis, self.site.layout)
        each = np.broadcast_to(step.astype(np.float64), wide.shape)
        made = rounded_bias(wide, each, size)
        if made.fault:
            raise FoldRefusedError(self.index, Reason.RANGE, f"the bias {made.fault}")
        single = step.size == 1
        return QuantisedTensors(
            None if single else 0, ir.Tensor(made.integers),
            ir.Tensor(step.reshape(() if single else (-1,)), dtype=dtype),
        )  # fmt: skip


def _tensor(values: Array, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(values.astype(dtype.numpy()), dtype=dtype)


def _changed(read: Callable[[], Array], found: Dequantised, turn: Turned) -> ir.TensorProtocol:
    stored = np.asarray(read()).astype(found.dtype.numpy(), copy=False)
    made = found.as_stored(turn.of(stored.transpose(found.order)))
    return ir.Tensor(made, dtype=found.dtype)
