"""How large each channel of a weight is before and after a fold: values in, plain numbers out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from bnfold.verify.result import WeightRange

SHOWN = 256  # channels; beyond, each number is the largest of several neighbours
_OUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}


def weight_ranges(
    reference: onnx.ModelProto, candidate: onnx.ModelProto
) -> tuple[WeightRange, ...]:
    """Of every linear operator whose weight is not the same in both models.

    Operators are paired by their names, or else by their order among those of their type and of
    the same weight's shape.

    Args:
        reference: The unfolded model, with its weights.
        candidate: The folded one.
    """
    pairs = _paired(list(_weights(reference.graph)), list(_weights(candidate.graph)))
    return tuple(
        WeightRange(new.tensor.name, old.channels(), new.channels())
        for old, new in pairs
        if old.tensor.dims == new.tensor.dims and not _same(old, new)
    )


class _Weight:
    def __init__(self, tensor: onnx.TensorProto, axis: int) -> None:
        self.tensor, self.axis = tensor, axis

    def channels(self) -> tuple[float, ...]:
        return channel_sizes(numpy_helper.to_array(self.tensor), self.axis)


def _weights(graph: onnx.GraphProto) -> Iterator[tuple[str, _Weight]]:
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in _OUT_AXIS or node.domain not in ("", "ai.onnx"):
            continue
        for position in (1, 0):
            tensor = stored.get(node.input[position]) if len(node.input) > position else None
            if tensor is not None:
                turned = any(a.name == "transB" and a.i for a in node.attribute)
                axis = 0 if turned else _OUT_AXIS[node.op_type]
                yield node.name, _Weight(tensor, axis)
                break


def _paired(
    before: list[tuple[str, _Weight]], after: list[tuple[str, _Weight]]
) -> list[tuple[_Weight, _Weight]]:
    named = {name: weight for name, weight in before if name}
    if all(name in named for name, _ in after):
        return [(named[name], weight) for name, weight in after]
    if [list(w.tensor.dims) for _, w in before] != [list(w.tensor.dims) for _, w in after]:
        return []
    return [(old, new) for (_, old), (_, new) in zip(before, after, strict=True)]


def _same(one: _Weight, other: _Weight) -> bool:
    a, b = one.tensor, other.tensor
    if a.raw_data or b.raw_data:
        return a.data_type == b.data_type and a.raw_data == b.raw_data
    return bool(np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b)))


def channel_sizes(weight: NDArray[np.generic], axis: int) -> tuple[float, ...]:
    """The largest absolute value of each channel, to three digits; at most 256 of them.

    Args:
        weight: A weight of floats.
        axis: Its axis of output channels.
    """
    if not weight.size or weight.dtype.kind not in "fV":
        return ()
    sizes = np.abs(weight.astype(np.float32))
    peaks = sizes.max(axis=tuple(i for i in range(weight.ndim) if i != axis % weight.ndim))
    if peaks.size > SHOWN:
        width = -(-peaks.size // SHOWN)
        starts = np.arange(0, peaks.size, width)
        peaks = np.maximum.reduceat(peaks, starts)
    return tuple(float(f"{peak:.3g}") for peak in peaks)
