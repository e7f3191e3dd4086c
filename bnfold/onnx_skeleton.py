"""skeleton(model) = the model's bytes, with a numbered placeholder for each tensor to be streamed.

Streamed are the large initializers of the main graph; with external data also those tensors of
subgraphs and Constant nodes that are not in memory yet. Whatever else is not in memory is loaded:
a tensor in the skeleton may refer to no file, as the skeleton will lie somewhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import onnx
import onnx_ir as ir

from bnfold import protobuf_wire as wire
from bnfold.onnx_read import LARGE_BYTES, Unparsed, all_graphs

# Marks the place of a tensor. No model can hold it: it is new in each run.
_PLACEHOLDER = f"bnfold:placeholder:{os.urandom(8).hex()}"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model's bytes without the ``tensors`` that its placeholders count."""

    content: bytes
    tensors: tuple[ir.TensorProtocol, ...]

    @property
    def streamed_bytes(self) -> int:
        """The sum of the bytes of all ``tensors``."""
        return sum(int(tensor.nbytes) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """About the size of the whole."""
        return len(self.content) + self.streamed_bytes


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place in the model that holds a tensor."""

    tensor: ir.TensorProtocol
    name: str
    main: bool
    put: Callable[[ir.TensorProtocol], None]


def skeleton(model: ir.Model, unparsed: Unparsed, *, external: bool) -> Skeleton:
    """Serialize ``model`` without its weights; it is the same afterwards.

    Args:
        model: The model.
        unparsed: Fields that the model's file has, and onnx-ir does not know.
        external: Whether tensors of subgraphs and nodes can be streamed.
    """
    slots = list(_slots(model))
    streamed = [slot for slot in slots if _is_streamed(slot, external)]
    numbers = {id(slot): number for number, slot in enumerate(streamed)}
    swaps = [(slot, _placeholder(slot, numbers[id(slot)])) for slot in streamed]
    # Before anything is swapped: what computes a tensor may raise, or look at the model.
    swaps += [(slot, _loaded(slot)) for slot in slots
              if id(slot) not in numbers and _is_absent(slot.tensor)]  # fmt: skip
    with _swapped(swaps):
        proto = ir.to_proto(model)
    assert isinstance(proto, onnx.ModelProto)
    _drop_types_of_initializers(proto.graph)
    content = proto.SerializeToString() + unparsed.model
    if unparsed.graph:  # a message that is given twice is merged
        content += wire.message(wire.MODEL_GRAPH, unparsed.graph)
        content = onnx.ModelProto.FromString(content).SerializeToString()
    return Skeleton(content, tuple(slot.tensor for slot in streamed))


def number_of(tensor: onnx.TensorProto) -> int | None:
    """Which placeholder ``tensor`` is, if it is one."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries["offset"]) if entries.get("location") == _PLACEHOLDER else None


# ---- places of tensors ----


def _slots(model: ir.Model) -> Iterator[_Slot]:
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                put = partial(setattr, value, "const_value")
                yield _Slot(value.const_value, value.name or "", graph is model.graph, put)
        for node in graph:
            for name, attribute in node.attributes.items():
                tensor = attribute.value
                if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
                    yield _Slot(tensor, tensor.name or "", False, partial(_set, node, name))


def _set(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    doc_string = node.attributes[name].doc_string
    node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=doc_string)


def _is_absent(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)


def _is_streamed(slot: _Slot, external: bool) -> bool:
    if slot.tensor.dtype == ir.DataType.STRING or slot.tensor.nbytes < LARGE_BYTES:
        return False
    return slot.main or (external and _is_absent(slot.tensor))


@contextmanager
def _swapped(swaps: Sequence[tuple[_Slot, ir.TensorProtocol]]) -> Iterator[None]:
    """While this lasts, each slot holds the other tensor."""
    try:
        for slot, tensor in swaps:
            slot.put(tensor)
        yield
    finally:
        for slot, _ in swaps:
            slot.put(slot.tensor)


def _placeholder(slot: _Slot, number: int) -> ir.TensorProtocol:
    tensor = slot.tensor
    return ir.ExternalTensor(
        _PLACEHOLDER, number, int(tensor.nbytes), tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()), name=slot.name,
        doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
    )  # fmt: skip


def _loaded(slot: _Slot) -> ir.TensorProtocol:
    """The same tensor in memory."""
    tensor = slot.tensor
    if isinstance(tensor, ir.LazyTensor):
        if tensor.dtype == ir.DataType.STRING:
            return ir.StringTensor(tensor.numpy(), shape=ir.Shape(tensor.shape.numpy()),
                                   name=slot.name)  # fmt: skip
        content = tensor.tobytes()
    else:
        content = _read(tensor) if tensor.nbytes else b""
    proto = onnx.TensorProto(
        name=slot.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy(), raw_data=content
    )
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    for key, value in tensor.metadata_props.items():
        proto.metadata_props.add(key=key, value=value)
    return ir.serde.TensorProtoTensor(proto)


def _read(tensor: ir.TensorProtocol) -> bytes:
    """The bytes of a tensor in a file; unlike ``tobytes``, this maps nothing that would stay."""
    assert isinstance(tensor, ir.ExternalTensor)
    buffer = BytesIO()
    tensor.tofile(buffer)
    return buffer.getvalue()


def _drop_types_of_initializers(graph: onnx.GraphProto) -> None:
    """Undo what onnx-ir adds: a value info for each initializer, saying what the tensor says."""
    stored = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.value_info if value.name not in stored]
    if len(kept) < len(graph.value_info):
        copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del graph.value_info[:]
        graph.value_info.extend(copies)
