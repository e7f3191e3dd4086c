"""An ONNX model under check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from bnfold.verify.models import LoadedModel, rounding_unit, user_inputs
from bnfold.verify.oracle import Oracle
from bnfold.verify.runner import OrtRunner
from bnfold.verify.subject import Feeds, Outputs, RunOptions, Size, TensorSpec


@dataclass(frozen=True, slots=True)
class OnnxSubject:
    """A loaded ONNX model, run by ONNX Runtime and by the reference evaluator in float64."""

    model: LoadedModel
    _made: dict[str, Oracle] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its path, or what it is called."""
        return self.model.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs without an initializer."""
        return tensor_specs(user_inputs(self.model.proto))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Graph outputs."""
        return tensor_specs(self.model.proto.graph.output)

    @property
    def unit(self) -> float:
        """Of the coarsest float type of its weights, inputs and outputs."""
        return rounding_unit(self.model.proto)

    def oracle(self) -> Callable[[Feeds], Outputs]:
        """The model lifted to float64."""
        return self.lifted.run

    @property
    def lifted(self) -> Oracle:
        """The oracle itself, made once: it holds all weights in float64.

        Raises:
            InconclusiveError: An operator has no implementation there.
        """
        if "oracle" not in self._made:
            self._made["oracle"] = Oracle(self.model.proto)
        return self._made["oracle"]

    def runner(self, provider: str, options: RunOptions) -> OrtRunner:
        """A session on ``provider`` alone."""
        return OrtRunner(self.model.session_source, provider, options)


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """Names, types and sizes as the graph states them."""
    return tuple(_spec(value) for value in values)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return TensorSpec(value.name, None, None, (kind or "untyped").removesuffix("_type"))
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) if tensor.elem_type else None
    shape = tuple(_size(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return TensorSpec(value.name, None if dtype is None else np.dtype(dtype), shape)


def _size(dim: onnx.TensorShapeProto.Dimension) -> Size:
    return dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
