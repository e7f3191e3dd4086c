"""Where an ONNX model's inputs meet their first linear operator and its BatchNorm.

From the input through Sub, Add, Mul, Div by constants, Transpose, Pad, Identity and Cast to a Conv,
Gemm or MatMul, and from there, maybe through the Add of a bias, to a BatchNormalization; or to a
BatchNormalization at once, which then says what the input itself looks like.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx
from numpy.typing import NDArray

from bnfold.verify.dtypes import family
from bnfold.verify.onnx_walk import Walk, attribute
from bnfold.verify.statistics import FirstLayer, InputStatistics, fit, seen_directly
from bnfold.verify.subject import TensorSpec

F64 = NDArray[np.float64]

_UNCHANGED = ("Identity", "Cast", "Pad", "Dropout")
# Fitting is for the first layer of a net, which is small.
_MOST_WEIGHTS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """``scale x + shift`` on each channel, the axes in some order; None: the same on all."""

    name: str
    order: tuple[int, ...]
    scale: F64
    shift: F64


def statistics_of(
    model: onnx.ModelProto, specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, InputStatistics]:
    """How the float inputs of a model are distributed, of those that reach a BatchNorm.

    Args:
        model: The model, unfolded.
        specs: Its inputs.
        shapes: The shape that each will be drawn in.
    """
    walk = Walk(model)
    found = {
        spec.name: _statistics(walk, spec.name, shapes[spec.name])
        for spec in specs
        if spec.dtype is not None and family(spec.dtype) == "float" and len(spec.shape or ()) > 1
    }
    return {name: known for name, known in found.items() if known is not None}


def _statistics(walk: Walk, name: str, shape: tuple[int, ...]) -> InputStatistics | None:
    start = _Value(name, tuple(range(len(shape))), np.ones(1), np.zeros(1))
    waiting, steps = deque([start]), 0
    while waiting and steps < 64:
        steps += 1
        value = waiting.popleft()
        for node, slot in walk.readers(value.name):
            known = _learnt(walk, node, slot, value, shape)
            if known is not None:
                return known
            after = _after(walk, node, slot, value)
            if after is not None:
                waiting.append(after)
    return None


# ---- on the way to the first layer ----


def _after(walk: Walk, node: onnx.NodeProto, slot: int, value: _Value) -> _Value | None:
    if node.op_type in _UNCHANGED and slot == 0:
        return replace(value, name=node.output[0])
    if node.op_type == "Transpose":
        order = attribute(node, "perm", tuple(reversed(range(len(value.order)))))
        moved = tuple(value.order[i] for i in order)
        return replace(value, name=node.output[0], order=moved)
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.input) != 2:
        return None
    constant = walk.constant(node.input[1 - slot])
    vector = None if constant is None else _per_channel(constant, len(value.order))
    if vector is None:
        return None
    return _changed(node, slot, value, vector)


def _changed(node: onnx.NodeProto, slot: int, value: _Value, vector: F64) -> _Value | None:
    scale, shift, name = value.scale, value.shift, node.output[0]
    if scale.size > 1 < vector.size and scale.size != vector.size:
        return None
    if node.op_type == "Add":
        return replace(value, name=name, scale=scale + 0 * vector, shift=shift + vector)
    if node.op_type == "Sub":
        sign = 1.0 if slot == 0 else -1.0
        return replace(
            value, name=name, scale=sign * scale + 0 * vector, shift=sign * (shift - vector)
        )
    if node.op_type == "Mul":
        return replace(value, name=name, scale=scale * vector, shift=shift * vector)
    if slot == 0 and vector.all():
        return replace(value, name=name, scale=scale / vector, shift=shift / vector)
    return None


def _per_channel(constant: NDArray[np.float64], rank: int) -> F64 | None:
    """A constant that varies along one axis at most, as a vector; None where it varies on more.

    Which axis that is shows when its length is compared with the channels.
    """
    wide = [n for n in constant.shape if n > 1]
    if constant.ndim > rank or len(wide) > 1 or constant.dtype.kind != "f":
        return None
    return constant.reshape(-1)


# ---- the first layer ----


def _learnt(
    walk: Walk, node: onnx.NodeProto, slot: int, value: _Value, shape: tuple[int, ...]
) -> InputStatistics | None:
    if slot != 0:
        return None
    if node.op_type == "BatchNormalization":
        return _seen_by(walk, node, value, shape)
    layer = _layer(walk, node, value, shape)
    if layer is None:
        return None
    for norm, bias in _norms(walk, node.output[0], len(layer.bias)):
        statistics = _running(walk, norm, len(layer.bias))
        if statistics is not None:
            mean, variance = statistics
            full = replace(layer, bias=layer.bias + bias, mean=mean, variance=variance)
            return fit(full, value.order[_channel_axis(node, value)])
    return None


def _channel_axis(node: onnx.NodeProto, value: _Value) -> int:
    return 1 if node.op_type in ("Conv", "BatchNormalization") else len(value.order) - 1


def _seen_by(
    walk: Walk, norm: onnx.NodeProto, value: _Value, shape: tuple[int, ...]
) -> InputStatistics | None:
    """Of a BatchNorm right behind the input."""
    axis = value.order[1]
    statistics = _running(walk, norm, shape[axis])
    if statistics is None:
        return None
    none = np.zeros(0)
    layer = FirstLayer(none, none, 1, value.scale, value.shift, *statistics)
    return seen_directly(layer, axis, spatial=len(shape) > 2)


def _layer(
    walk: Walk, node: onnx.NodeProto, value: _Value, shape: tuple[int, ...]
) -> FirstLayer | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return None
    stored = walk.stored_shape(node.input[1])
    if stored is not None and prod(stored) > _MOST_WEIGHTS:
        return None
    weight = walk.constant(node.input[1])
    if weight is None or weight.ndim < 2 or (node.op_type != "Conv" and weight.ndim != 2):
        return None
    alpha = beta = 1.0
    if node.op_type != "Conv":
        weight = weight if attribute(node, "transB", 0) else weight.T
        alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
    sizes = [shape[axis] for axis in value.order]
    groups = int(attribute(node, "group", 1))
    channels = sizes[_channel_axis(node, value)]
    if attribute(node, "transA", 0) or weight.shape[1] * groups != channels:
        return None
    if value.scale.size not in (1, channels):
        return None
    bias = walk.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    if bias is None or bias.size not in (1, len(weight)):
        return None
    kernel = weight.ndim - 2
    dilations = tuple(int(d) for d in attribute(node, "dilations", (1,) * kernel))
    return FirstLayer(
        alpha * weight, np.broadcast_to(beta * bias.reshape(-1), (len(weight),)), groups,
        np.broadcast_to(value.scale, (channels,)), np.broadcast_to(value.shift, (channels,)),
        np.zeros(0), np.zeros(0), dilations, tuple(sizes[2:]) if kernel else (),
    )  # fmt: skip


def _norms(walk: Walk, name: str, outputs: int) -> list[tuple[onnx.NodeProto, F64]]:
    """BatchNorms behind a linear operator, each with what has been added on the way."""
    found: list[tuple[onnx.NodeProto, F64]] = []
    waiting = [(name, np.zeros(outputs))]
    for name, bias in waiting:
        for node, slot in walk.readers(name):
            if node.op_type == "BatchNormalization" and slot == 0:
                found.append((node, bias))
            elif node.op_type in ("Identity", "Cast"):
                waiting.append((node.output[0], bias))
            elif node.op_type == "Add":
                added = walk.constant(node.input[1 - slot])
                if added is not None and added.size in (1, outputs):
                    waiting.append((node.output[0], bias + added.reshape(-1)))
    return found


def _running(walk: Walk, norm: onnx.NodeProto, channels: int) -> tuple[F64, F64] | None:
    """Running mean and variance; None where they are not constant, or not used."""
    if len(norm.input) < 5 or attribute(norm, "training_mode", 0):
        return None
    mean, variance = (walk.constant(name) for name in norm.input[3:5])
    if mean is None or variance is None or mean.size != channels or variance.size != channels:
        return None
    return mean.reshape(-1), variance.reshape(-1)
