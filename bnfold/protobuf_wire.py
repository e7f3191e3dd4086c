"""The protobuf wire format, as far as an ONNX file has to be cut into pieces and put together.

A message is a row of fields: a tag (field number and wire type), then a varint, 4 or 8 bytes, or
a length and that many bytes. Source: protobuf.dev, "Encoding"; field numbers: onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

Buffer = bytes | mmap.mmap

MODEL_GRAPH = 7
MODEL_TRAINING_INFO = 20
GRAPH_INITIALIZER = 5
GRAPH_SPARSE_INITIALIZER = 15
TENSOR_RAW_DATA = 9
TENSOR_EXTERNAL_DATA = 13
TENSOR_DATA_LOCATION = 14

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """The bytes are no protobuf message; ``truncated`` when they end too early."""

    def __init__(self, text: str, *, truncated: bool = False) -> None:
        super().__init__(text)
        self.truncated = truncated


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its number, where it starts, where its value starts, and where both end."""

    number: int
    start: int
    value: int
    end: int
    is_message: bool


def fields(buffer: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in ``buffer[start:end]``.

    Raises:
        WireError: It is no message.
    """
    at = start
    while at < end:
        tag, value = read_varint(buffer, at, end)
        kind = tag & 7
        if kind == _VARINT:
            _, stop = read_varint(buffer, value, end)
        elif kind == _LENGTH:
            length, value = read_varint(buffer, value, end)
            stop = value + length
        elif kind in (_FIXED32, _FIXED64):
            stop = value + (4 if kind == _FIXED32 else 8)
        else:
            raise WireError(f"wire type {kind} at byte {at}")
        if stop > end:
            raise WireError(f"a field of {stop - value} bytes at byte {at}", truncated=True)
        yield Field(tag >> 3, at, value, stop, kind == _LENGTH)
        at = stop


def read_varint(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends."""
    result = shift = 0
    while at < end:
        byte = buffer[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7
        if shift > 63:
            raise WireError(f"a number of more than 64 bits at byte {at}")
    raise WireError(f"a number at byte {at}", truncated=True)


def varint(number: int) -> bytes:
    """``number`` as a varint."""
    result = bytearray()
    while number > 127:
        result.append(number & 127 | 128)
        number >>= 7
    result.append(number)
    return bytes(result)


def header(number: int, length: int) -> bytes:
    """What stands before ``length`` bytes that are field ``number``."""
    return varint(number << 3 | _LENGTH) + varint(length)


def message(number: int, payload: bytes) -> bytes:
    """``payload`` as field ``number``."""
    return header(number, len(payload)) + payload


def enum(number: int, value: int) -> bytes:
    """A small number as field ``number``."""
    return varint(number << 3 | _VARINT) + varint(value)
