"""Stored ONNX tensors: where they are, how large they are, and how to read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


def read_tensor(tensor: ir.TensorProtocol) -> Array:
    """The array of a stored tensor.

    One in a file is read, not mapped: a mapping holds a file descriptor until it is released, and
    a model has thousands of tensors.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    if tensor.dtype.bitwidth < 8:
        array = tensor.numpy().copy()
        tensor.release()
        return array
    dtype = tensor.dtype.numpy().newbyteorder("<")
    read = np.fromfile(tensor.path, dtype, count=tensor.size, offset=tensor.offset or 0)
    return read.astype(tensor.dtype.numpy(), copy=False).reshape(tensor.shape.numpy())


def rows_of_file(tensor: ir.ExternalTensor, count: int) -> Iterator[Array]:
    """The array of a tensor in a file, ``count`` rows at a time, in memory that is used again.

    A block is valid until the next one is asked for.
    """
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy().newbyteorder("<")
    memory = np.empty((min(count, shape[0]), *shape[1:]), dtype=dtype)
    with Path(tensor.path).open("rb", buffering=0) as file:
        file.seek(tensor.offset or 0)
        for start in range(0, shape[0], count):
            block = memory[: min(count, shape[0] - start)]
            if file.readinto(block.reshape(-1).view(np.uint8).data) != block.nbytes:
                raise OSError(f"{tensor.path} ends within tensor '{tensor.name}'")
            yield block


def constant_of(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor that a Constant node states, in whichever of its attributes."""
    for name, attribute in node.attributes.items():
        if name == "value":
            # Not as_tensor(): it checks a runtime protocol, which takes longer than all the rest.
            tensor: ir.TensorProtocol = attribute.value
            return tensor
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.array(attribute.value, dtype=np.float32))
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.array(attribute.value, dtype=np.int64))
    return None


def stored_bytes(value: ir.Value) -> int:
    """The size of a stored tensor in bytes; 0 where it is computed."""
    if value.const_value is not None:
        return int(value.const_value.nbytes)
    producer = value.producer()
    if producer is None or producer.op_type != "Constant":
        return 0
    tensor = constant_of(producer)
    return 0 if tensor is None else int(tensor.nbytes)
