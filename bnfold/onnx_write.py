"""Writing an ONNX file at once or not at all, one weight at a time.

Untouched weights are copied from file to file by the kernel; folded ones are computed in a second
thread while the one before is written. What is held in memory is the small rest of the model and
the few weights in flight.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from bnfold import protobuf_wire as wire
from bnfold.errors import UsageError, WriteError
from bnfold.onnx_read import LARGE_BYTES, ModelFile

Wrote = Callable[[int, int], None]

_PLACEHOLDER = "bnfold:placeholder"
_IN_FLIGHT_BYTES = 128 << 20
_ALIGNED_BYTES = 1 << 20  # a tensor from this size on starts on a page, so that it can be mapped
_PAGE = 4096
_PROTO_LIMIT = (1 << 31) - (1 << 20)


def write_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external: bool = False,
    source: ModelFile | None = None,
    on_progress: Wrote | None = None,
) -> None:
    """Write ``model`` to ``path``; on any error nothing is left there.

    Args:
        model: It is the same afterwards; its lazy tensors are computed one at a time.
        path: Replaced at once when all is written.
        external: Keep large initializers in ``<path>.data``. A model of 2 GiB and more is written
            so in any case.
        source: The file that the model was read from, which must not be overwritten.
        on_progress: Called with the bytes of weights written and their sum.

    Raises:
        UsageError: ``path`` or its data file is one that the model was read from.
        WriteError: It can't be written.
    """
    path = Path(path)
    data = path.with_name(f"{path.name}.data")
    _refuse_source(path, data, source)
    large = _large_initializers(model)
    total = sum(int(value.const_value.nbytes) for value in large if value.const_value is not None)
    skeleton, tensors = _placeholders(model, large)
    external = external or len(skeleton) + total >= _PROTO_LIMIT
    with _atomic(path, data, len(skeleton) + total) as (model_file, data_file):
        stream = _Stream(tensors, total, on_progress)
        if external:
            located = _write_data(stream, data_file, tensors)
            _write_located(skeleton, model_file, located, data.name)
        else:
            _write_inline(stream, skeleton, model_file, tensors)


def _refuse_source(path: Path, data: Path, source: ModelFile | None) -> None:
    if source is None:
        return
    for target in (path, data):
        for read in (source.path, *source.data_files):
            if target.exists() and read.exists() and target.samefile(read):
                todo = "choose another output; the input is never changed"
                raise UsageError("the output is the input", file=str(target), todo=todo)


# ---- the small rest of the model ----


def _large_initializers(model: ir.Model) -> list[ir.Value]:
    return [
        value for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= LARGE_BYTES
        and value.const_value.dtype != ir.DataType.STRING
    ]  # fmt: skip


def _placeholders(
    model: ir.Model, large: Sequence[ir.Value]
) -> tuple[bytes, list[ir.TensorProtocol]]:
    """The model's bytes with its large tensors as numbered placeholders, and those tensors."""
    tensors = [value.const_value for value in large if value.const_value is not None]
    try:
        for number, (value, tensor) in enumerate(zip(large, tensors, strict=True)):
            value.const_value = ir.ExternalTensor(
                _PLACEHOLDER, number, tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=value.name or "",
                doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
            )  # fmt: skip
        proto = ir.to_proto(model)
    finally:
        for value, tensor in zip(large, tensors, strict=True):
            value.const_value = tensor
    assert isinstance(proto, onnx.ModelProto)
    return proto.SerializeToString(), tensors


def _number(tensor: onnx.TensorProto) -> int | None:
    """Which placeholder ``tensor`` is, if it is one."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries["offset"]) if entries.get("location") == _PLACEHOLDER else None


# ---- weights, one at a time ----


class _Stream:
    """Writes tensors in the order in which they are asked for, computing ahead."""

    def __init__(
        self, tensors: Sequence[ir.TensorProtocol], total: int, on_progress: Wrote | None
    ) -> None:
        self._tensors, self._total, self._tell = tensors, total, on_progress
        self._done = 0
        self._ahead: deque[tuple[int, Future[ir.TensorProtocol]]] = deque()
        self._next = 0
        self._flying = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While this lasts, a second thread computes lazy tensors before they are asked for."""
        with ThreadPoolExecutor(1, thread_name_prefix="bnfold-fold") as self._pool:
            try:
                yield
            finally:
                for _, future in self._ahead:
                    future.cancel()

    def write(self, number: int, file: BinaryIO) -> None:
        """Write tensor ``number``; numbers have to come in ascending order."""
        self._look_ahead(number)
        tensor = self._tensors[number]
        size = int(tensor.nbytes)
        if self._ahead and self._ahead[0][0] == number:
            tensor = self._ahead.popleft()[1].result()
            self._flying -= size
        _to_file(tensor, file)
        self._done += size
        if self._tell is not None:
            self._tell(self._done, self._total)

    def _look_ahead(self, number: int) -> None:
        self._next = max(self._next, number)
        while self._next < len(self._tensors) and (not self._ahead or self._has_room()):
            tensor = self._tensors[self._next]
            if isinstance(tensor, ir.LazyTensor):
                self._flying += int(tensor.nbytes)
                future = self._pool.submit(_evaluated, tensor)
                self._ahead.append((self._next, future))
            self._next += 1

    def _has_room(self) -> bool:
        return self._flying + int(self._tensors[self._next].nbytes) <= _IN_FLIGHT_BYTES


def _evaluated(tensor: ir.LazyTensor) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype)


def _to_file(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    if isinstance(tensor, ir.TensorProtoTensor | ir.ExternalTensor | ir.Tensor):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())


def _write_data(
    stream: _Stream, path: Path, tensors: Sequence[ir.TensorProtocol]
) -> list[tuple[int, int]]:
    """All tensors into the data file; where each is: offset and length."""
    located = []
    with path.open("wb") as file, stream.computing():
        for number, tensor in enumerate(tensors):
            at = file.tell()
            if tensor.nbytes >= _ALIGNED_BYTES and at % _PAGE:
                file.write(b"\0" * (_PAGE - at % _PAGE))
            located.append((file.tell(), int(tensor.nbytes)))
            stream.write(number, file)
    return located


def _write_located(
    skeleton: bytes, path: Path, located: Sequence[tuple[int, int]], name: str
) -> None:
    proto = onnx.ModelProto.FromString(skeleton)
    for tensor in proto.graph.initializer:
        number = _number(tensor)
        if number is not None:
            del tensor.external_data[:]
            for key, value in zip(("location", "offset", "length"), (name, *located[number]),
                                  strict=True):  # fmt: skip
                tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(proto.SerializeToString())


def _write_inline(
    stream: _Stream, skeleton: bytes, path: Path, tensors: Sequence[ir.TensorProtocol]
) -> None:
    """The skeleton with the bytes of each tensor in the place of its placeholder."""
    with path.open("wb") as file, stream.computing():
        for field in wire.fields(skeleton, 0, len(skeleton)):
            if field.number != wire.MODEL_GRAPH:
                file.write(skeleton[field.start : field.end])
                continue
            pieces = list(_graph_pieces(skeleton, field, tensors))
            length = sum(len(head) + size for head, size, _ in pieces)
            file.write(wire.header(wire.MODEL_GRAPH, length))
            for head, _, number in pieces:
                file.write(head)
                if number is not None:
                    stream.write(number, file)


def _graph_pieces(
    skeleton: bytes, graph: wire.Field, tensors: Sequence[ir.TensorProtocol]
) -> Iterator[tuple[bytes, int, int | None]]:
    """Bytes of the graph; after some of them a tensor follows: its size and number."""
    for field in wire.fields(skeleton, graph.value, graph.end):
        whole = skeleton[field.start : field.end]
        if field.number != wire.GRAPH_INITIALIZER:
            yield whole, 0, None
            continue
        tensor = onnx.TensorProto.FromString(skeleton[field.value : field.end])
        number = _number(tensor)
        if number is None:
            yield whole, 0, None
            continue
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        size = int(tensors[number].nbytes)
        inner = tensor.SerializeToString() + wire.header(wire.TENSOR_RAW_DATA, size)
        yield wire.header(wire.GRAPH_INITIALIZER, len(inner) + size) + inner, size, number


# ---- at once or not at all ----


@contextmanager
def _atomic(path: Path, data: Path, needed: int) -> Iterator[tuple[Path, Path]]:
    """Paths to write to, in a folder beside ``path``; moved to their place when all went well."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        model_file, data_file = folder / path.name, folder / data.name
        yield model_file, data_file
        for made, target in ((data_file, data), (model_file, path)):
            if made.exists():
                if target.exists():
                    shutil.copymode(target, made)
                made.replace(target)
    except OSError as error:
        raise _write_error(path, error, needed) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_error(path: Path, error: OSError, needed: int) -> WriteError:
    if error.errno == errno.ENOSPC:
        met = f"the disk is full: {needed:,} bytes are needed"
        return WriteError(met, file=str(path), todo="free some space or choose another output")
    if path.is_dir():
        return WriteError("it is a directory", file=str(path), todo="give the path of a file")
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        met = f"the folder {path.parent} does not exist"
        return WriteError(met, file=str(path), todo="make it first")
    met = f"it can't be written: {error.strerror or error}"
    return WriteError(met, file=str(path), todo="choose another output")
