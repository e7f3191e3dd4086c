"""Small quantised nets: operators whose weight is DequantizeLinear of integers, and steps.

`sqnr` is the measure of what a fold may not make worse: signal to noise, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from bnfold.verify.oracle import Oracle
from tests import nets
from tests.nets import Array

BN = "BatchNormalization"
LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weight as integers, of ``shape``.

    ``axis`` is the one along which its scales vary, None for a single one. With ``zeros`` there
    are zero points beside 0.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    dtype: DTypeLike = np.int8
    zeros: bool = False
    scale: DTypeLike = np.float32

    def constants(self, seed: int = 0) -> dict[str, Array]:
        """``q``, ``qs`` and ``qz``; all integers can be negated about their zero point."""
        rng = np.random.default_rng(seed)
        info = ml_dtypes.iinfo(self.dtype)  # type: ignore[no-untyped-call]
        count = () if self.axis is None else (self.shape[self.axis],)
        low, high = int(info.min), int(info.max)
        middle = 0 if low < 0 else (low + high + 1) // 2
        zero = np.full(count, middle)
        if self.zeros:
            zero = zero + rng.integers(-2, 3, count)
        reach = min(high - int(zero.max()), int(zero.min()) - low)
        along = [1] * len(self.shape)
        if self.axis is not None:
            along[self.axis] = -1
        integers = rng.integers(-reach, reach + 1, self.shape) + zero.reshape(along or ())
        return {
            "q": integers.astype(self.dtype), "qz": zero.astype(self.dtype),
            "qs": (rng.uniform(0.5, 2, count) / high).astype(self.scale),
        }  # fmt: skip

    @property
    def node(self) -> str:
        """The text of its DequantizeLinear, which makes ``d``."""
        axis = "" if self.axis is None else f"<axis = {self.axis}>"
        return f"d = DequantizeLinear{axis}(q, qs, qz)"


def wide(constants: Mapping[str, Array], axis: int | None, of: str = "q") -> NDArray[np.float64]:
    """What integers stand for, in float64, by the text of the standard."""
    q, s, z = (constants[name].astype(np.float64) for name in (of, f"{of}s", f"{of}z"))
    shape = [1] * q.ndim
    if axis is not None:
        shape[axis] = -1
    return (q - z.reshape(shape)) * s.reshape(shape)


def in_float(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float64 without a DequantizeLinear: what it says, computed by other means."""
    made: onnx.ModelProto = onnx.ModelProto.FromString(proto.SerializeToString())
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    nodes = []
    for node in made.graph.node:
        read = [stored.get(name) for name in node.input]
        if node.op_type != "DequantizeLinear" or read[0] is None or read[1] is None:
            nodes.append(node)
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        zero = read[2] if len(read) > 2 else np.zeros((), np.int8)
        assert zero is not None
        single = read[1].size == 1
        known = {"q": read[0], "qs": read[1].ravel() if not single else read[1].reshape(()),
                 "qz": zero.ravel() if zero.size > 1 else zero.reshape(())}  # fmt: skip
        if not single and zero.size == 1:
            known["qz"] = np.full(read[1].size, zero.item())
        value = wide(known, None if single else axis)
        made.graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def run(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs in float64, weights dequantised by hand."""
    return Oracle(in_float(proto)).run(dict(feeds))


def on_ort(
    proto: onnx.ModelProto, feeds: Mapping[str, Array], level: ort.GraphOptimizationLevel
) -> Array:
    """The first output on ONNX Runtime."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: Array = session.run(None, dict(feeds))[0]
    return result


def sqnr(signal: Array, noisy: Array) -> float:
    """Signal to noise in decibels; infinite where both are the same."""
    noise = float(np.square(noisy.astype(np.float64) - signal).sum())
    power = float(np.square(signal.astype(np.float64)).sum())
    return float(10 * np.log10(power / noise)) if noise else np.inf


def every_tensor(
    proto: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]]
) -> dict[str, list[Array]]:
    """All float tensors of a model in float64, sample by sample."""
    found: dict[str, list[Array]] = {}
    for feed in feeds:
        values: dict[str, Array] = {}
        for node in Oracle(proto).walk(dict(feed), values):
            for name in node.output:
                if name and values[name].dtype == np.float64:
                    found.setdefault(name, []).append(values[name].copy())
    return found


def model(
    body: str, constants: Mapping[str, Array], *, given: str = "float[2,4,6,6] x",
    made: str = "float[2,8,6,6] y", opset: int = 17,
) -> onnx.ModelProto:  # fmt: skip
    """A net with those of ``constants`` that its text names."""
    used = nets.words(body)
    kept = {name: value for name, value in constants.items() if name in used}
    ir = 11 if opset > 21 else 10 if opset >= 21 else 8
    proto: onnx.ModelProto = nets.model(
        f"g ({given}) => ({made}) {{ {body} }}", kept, opset=opset, ir=ir
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto
