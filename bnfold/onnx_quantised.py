"""Constants behind DequantizeLinear: which there are, and what they hold.

A DequantizeLinear of constants is no constant: evaluated, it would be the floats that somebody
took care to store as integers. What is asked of it is where its integers and its scale are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bnfold.layout import F64, Array
from bnfold.onnx_constants import MOVES, Constants
from bnfold.quantised import I64

INTEGERS = frozenset({
    ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT4,
    ir.DataType.UINT4,
})  # fmt: skip
PER_AXIS_SINCE = 13
"""The first version of DequantizeLinear that has an axis."""


@dataclass(frozen=True, slots=True)
class Dequantised:
    """``scale * (integers - zero_point)``, all of them constant, as an operator reads it.

    Behind a Transpose the axes are others than those that are stored: axis ``k`` is the stored one
    ``order[k]``. ``shape`` and ``axis`` are as they are read; ``axis`` is the one along which scale
    and zero point vary, None where they are one number. ``fault`` says why it can't be scaled,
    empty if it can.
    """

    node: ir.Node
    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    dtype: ir.DataType
    shape: tuple[int, ...]
    axis: int | None
    order: tuple[int, ...] = ()
    fault: str = ""

    @property
    def output(self) -> ir.Value:
        """What it makes."""
        return self.node.outputs[0]

    def zero(self, constants: Constants) -> I64:
        """The zero points, of the shape of `step`."""
        step = constants.float64(self.scale).ravel()
        if self.zero_point is None:
            return np.zeros(step.shape, np.int64)
        stored = np.asarray(constants.array(self.zero_point)).astype(np.int64).ravel()
        return np.broadcast_to(stored, step.shape)

    def step(self, constants: Constants) -> F64:
        """The scales: one, or one for each entry of the axis."""
        return constants.float64(self.scale).ravel()

    def read(self, constants: Constants) -> Array:
        """The integers in their type, as they are read."""
        stored = np.asarray(constants.array(self.integers))
        return stored.astype(self.dtype.numpy(), copy=False).transpose(self.order)

    def as_stored(self, read: Array) -> Array:
        """Integers as they are read, in the order in which they are stored."""
        return np.ascontiguousarray(read.transpose(np.argsort(self.order)))

    def array(self, constants: Constants) -> F64:
        """What it stands for."""
        along = [1] * len(self.shape)
        if self.axis is not None:
            along[self.axis] = -1
        zero, step = self.zero(constants).reshape(along), self.step(constants).reshape(along)
        wide: F64 = (self.read(constants).astype(np.float64) - zero) * step
        return wide


def source_of(value: ir.Value) -> ir.Node | None:
    """The node that makes ``value``, looking through Identity."""
    producer = value.producer()
    while producer is not None and producer.op_type == "Identity" and producer.inputs[0]:
        producer = producer.inputs[0].producer()
    return producer


def quantised_weight(constants: Constants, value: ir.Value | None) -> Dequantised | None:
    """The integers that a weight is dequantised from, if a scale can go into them."""
    found = None if value is None else any_dequantised(constants, value)
    usable = found is not None and not found.fault and found.dtype in INTEGERS
    return found if usable else None


def quantised_bias(constants: Constants, value: ir.Value | None) -> Dequantised | None:
    """The integers that a bias is dequantised from, as quantisers write it: int32 around 0."""
    found = None if value is None else any_dequantised(constants, value)
    if found is None or found.fault or found.dtype != ir.DataType.INT32 or len(found.shape) != 1:
        return None
    return None if found.zero(constants).any() else found


def weight_fault(constants: Constants, value: ir.Value) -> str:
    """Why a weight that is dequantised can take no scale; empty for all others."""
    producer = source_of(value)
    while producer is not None and producer.op_type in MOVES:
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return ""
    if not all(constants.is_constant(v) for v in producer.inputs if v is not None):
        return "quantised in the graph"
    found = any_dequantised(constants, value)
    if found is None:
        return "moved about behind DequantizeLinear"
    return found.fault or f"{found.dtype.name} behind DequantizeLinear"


def any_dequantised(constants: Constants, value: ir.Value) -> Dequantised | None:
    """What ``value`` is dequantised from, whether a scale can go into it or not."""
    moves = _moved(constants, value)
    node = moves[-1].inputs[0].producer() if moves and moves[-1].inputs[0] else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or not constants.is_plain(node):
        return None
    integers, scale = node.inputs[0], node.inputs[1]
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if integers is None or scale is None:
        return None
    read = [v for v in (integers, scale, zero_point) if v is not None]
    if not all(constants.is_constant(v) for v in read):
        return None
    dtype = constants.dtype(integers) or ir.DataType.UNDEFINED
    shape, sizes = constants.shape(integers), constants.shape(scale)
    axis, order = _axis(node, shape, sizes), _order(moves, len(shape))
    fault = _fault(constants, node, scale, dtype)
    if not fault and (len(sizes) > 1 or (axis is not None and shape[axis] != sizes[0])):
        fault = "quantised in blocks"
    return Dequantised(
        node, integers, scale, zero_point, dtype, tuple(shape[k] for k in order),
        None if axis is None else order.index(axis), order, fault,
    )  # fmt: skip


def _moved(constants: Constants, value: ir.Value) -> list[ir.Node]:
    """The Identities and Transposes that make ``value`` of something, the last one first."""
    found: list[ir.Node] = []
    producer = value.producer()
    while producer is not None and producer.op_type in ("Identity", "Transpose"):
        if not constants.is_plain(producer) or producer.inputs[0] is None:
            break
        found.append(producer)
        producer = producer.inputs[0].producer()
    return found


def _order(moves: list[ir.Node], rank: int) -> tuple[int, ...]:
    """Which stored axis each axis is, behind ``moves``."""
    order = tuple(range(rank))
    for node in reversed(moves):
        if node.op_type == "Transpose":
            given = node.attributes.get("perm")
            perm = range(rank)[::-1] if given is None else given.as_ints()
            order = tuple(order[k] for k in perm)
    return order


def _axis(node: ir.Node, shape: tuple[int, ...], sizes: tuple[int, ...]) -> int | None:
    if all(size == 1 for size in sizes) or not shape:
        return None
    attribute = node.attributes.get("axis")
    axis = 1 if attribute is None else attribute.as_int()
    return min(axis % len(shape) if axis < 0 else axis, len(shape) - 1)


def _fault(constants: Constants, node: ir.Node, scale: ir.Value, dtype: ir.DataType) -> str:
    block, made = (node.attributes.get(name) for name in ("block_size", "output_dtype"))
    if block is not None and block.as_int():
        return "quantised in blocks"
    if dtype not in INTEGERS | {ir.DataType.INT32}:
        return f"{dtype.name} behind DequantizeLinear"
    if not constants.is_float(scale):
        return "quantised, its scale of no float type"
    if made is not None and made.as_int() not in (0, int(constants.dtype(scale) or 0)):
        return "quantised, its scale of another type"
    return ""


def activation_step(constants: Constants, value: ir.Value | None) -> F64 | None:
    """The scale of an activation that is dequantised by one constant; None of any other."""
    node = None if value is None else source_of(value)
    if node is None or node.op_type != "DequantizeLinear" or not constants.is_plain(node):
        return None
    scale = node.inputs[1]
    if scale is None or not constants.is_constant(scale) or not constants.is_float(scale):
        return None
    step = constants.float64(scale).ravel()
    return step if step.size == 1 else None
