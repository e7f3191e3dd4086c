"""Two models can be compared when they take and return the same tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from bnfold.errors import UsageError
from bnfold.verify.models import LoadedModel, user_inputs


def require_same_interface(reference: LoadedModel, candidate: LoadedModel) -> None:
    """Both models take and return tensors of the same names, types and sizes.

    Raises:
        UsageError: Names the first input or output that differs.
    """
    sides: tuple[tuple[str, Sequence[onnx.ValueInfoProto], Sequence[onnx.ValueInfoProto]], ...] = (
        ("input", user_inputs(reference.proto), user_inputs(candidate.proto)),
        ("output", reference.proto.graph.output, candidate.proto.graph.output),
    )
    for what, before, after in sides:
        fault = _interface_fault({v.name: v for v in before}, {v.name: v for v in after})
        if fault:
            raise UsageError(
                f"the models' interfaces differ: {what} {fault}", file=candidate.name,
                todo="check a model against the one it was made from",
            )  # fmt: skip


def _interface_fault(
    before: Mapping[str, onnx.ValueInfoProto], after: Mapping[str, onnx.ValueInfoProto]
) -> str:
    for name in (*before, *after):
        if name not in after:
            return f"'{name}' is missing"
        if name not in before:
            return f"'{name}' is not in the reference"
        one, other = _described(before[name]), _described(after[name])
        if not _compatible(before[name], after[name]):
            return f"'{name}' is {other}, not {one}"
    return ""


def _compatible(one: onnx.ValueInfoProto, other: onnx.ValueInfoProto) -> bool:
    if one.type.WhichOneof("value") != other.type.WhichOneof("value"):
        return False
    left, right = one.type.tensor_type, other.type.tensor_type
    if left.elem_type != right.elem_type:
        return False
    # A side that says nothing of its shape contradicts nothing.
    if not left.HasField("shape") or not right.HasField("shape"):
        return True
    sizes = (left.shape.dim, right.shape.dim)
    return len(sizes[0]) == len(sizes[1]) and all(
        a.dim_value == b.dim_value
        for a, b in zip(*sizes, strict=True)
        if a.HasField("dim_value") and b.HasField("dim_value")
    )


def _described(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value") or "untyped")
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    sizes = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?"
             for d in tensor.shape.dim]  # fmt: skip
    return f"{kind}[{', '.join(sizes)}]" if tensor.HasField("shape") else kind
