"""Writing an ONNX file at once or not at all, one weight at a time.

The small rest of the model is written first, with gaps for the weights; then two threads fill the
gaps. Untouched weights are copied from file to file by the kernel, folded ones computed some rows
at a time, so that what is held in memory does not depend on the size of the weights.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import onnx
import onnx_ir as ir

from bnfold import protobuf_wire as wire
from bnfold.errors import UsageError, WriteError
from bnfold.onnx_external import all_tensors
from bnfold.onnx_fill import Place, Wrote, fill
from bnfold.onnx_read import ModelFile, Unparsed
from bnfold.onnx_skeleton import Skeleton, number_of, skeleton

_ALIGNED_BYTES = 1 << 20  # a tensor from this size on starts on a page, so that it can be mapped
_PAGE = 4096
_PROTO_LIMIT = (1 << 31) - (1 << 20)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        ReadError: A file that holds weights of ``model`` is gone.
        WriteError: It can't be written.
    """
    path = Path(path)
    refuse_overwriting(source, path)
    whole = _skeleton(model, source, external)
    if not external and whole.nbytes >= _PROTO_LIMIT:
        external, whole = True, _skeleton(model, source, True)
    with Staging(path, whole.nbytes) as staging:
        if external and whole.tensors:
            places = _lay_out_data(whole.tensors)
            _write_located(whole, staging.model, places, staging.data.name)
            fill(staging.data, places, on_progress)
        else:
            fill(staging.model, _write_rest(whole, staging.model), on_progress)
        staging.publish()


def _skeleton(model: ir.Model, source: ModelFile | None, external: bool) -> Skeleton:
    unparsed = Unparsed() if source is None else source.unparsed
    return skeleton(model, unparsed, external=external)


def data_path(path: Path) -> Path:
    """Where the external data of a model at ``path`` is written."""
    return path.with_name(f"{path.name}.data")


def refuse_overwriting(source: ModelFile | None, path: Path) -> None:
    """Refuse to write to ``path`` and its data file if the model was read from either.

    Raises:
        UsageError: It was, under whatever name.
    """
    for target in (path, data_path(path)):
        for read in () if source is None else (source.path, *source.data_files):
            if target.exists() and read.exists() and target.samefile(read):
                todo = "choose another output; the input is never changed"
                raise UsageError("the output is the input", file=str(target), todo=todo)


def _lay_out_data(tensors: Sequence[ir.TensorProtocol]) -> list[Place]:
    """The places of all tensors in a data file."""
    places, at = [], 0
    for tensor in tensors:
        if tensor.nbytes >= _ALIGNED_BYTES:
            at = -(-at // _PAGE) * _PAGE
        places.append(Place(at, tensor))
        at += int(tensor.nbytes)
    return places


def _write_located(whole: Skeleton, path: Path, places: Sequence[Place], name: str) -> None:
    """The model with its placeholders as references into the data file ``name``."""
    proto = onnx.ModelProto()
    proto.ParseFromString(whole.content)
    for tensor in all_tensors(proto):
        number = number_of(tensor)
        if number is not None:
            place = places[number]
            del tensor.external_data[:]
            entries = {"location": name, "offset": place.offset, "length": place.tensor.nbytes}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(proto.SerializeToString())


def _write_rest(whole: Skeleton, path: Path) -> list[Place]:
    """The skeleton with a gap for each tensor in the place of its placeholder, and the gaps."""
    content, places = whole.content, []
    with path.open("wb") as file:
        for field in wire.fields(content, 0, len(content)):
            if field.number != wire.MODEL_GRAPH:
                file.write(content[field.start : field.end])
                continue
            pieces = list(_graph_pieces(content, field, whole.tensors))
            length = sum(len(head) + size for head, size, _ in pieces)
            file.write(wire.header(wire.MODEL_GRAPH, length))
            for head, size, number in pieces:
                file.write(head)
                if number is not None:
                    places.append(Place(file.tell(), whole.tensors[number]))
                    file.seek(size, os.SEEK_CUR)
        file.truncate()
    return places


def _graph_pieces(
    skeleton: bytes, graph: wire.Field, tensors: Sequence[ir.TensorProtocol]
) -> Iterator[tuple[bytes, int, int | None]]:
    """Bytes of the graph; after some of them a tensor follows: its size and number."""
    for field in wire.fields(skeleton, graph.value, graph.end):
        whole = skeleton[field.start : field.end]
        if field.number != wire.GRAPH_INITIALIZER:
            yield whole, 0, None
            continue
        tensor = onnx.TensorProto()
        tensor.ParseFromString(skeleton[field.value : field.end])
        number = number_of(tensor)
        if number is None:
            yield whole, 0, None
            continue
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        size = int(tensors[number].nbytes)
        inner = tensor.SerializeToString() + wire.header(wire.TENSOR_RAW_DATA, size)
        yield wire.header(wire.GRAPH_INITIALIZER, len(inner) + size) + inner, size, number


# ---- at once or not at all ----


class Staging:
    """A folder beside ``path`` to write in, gone afterwards; `publish` moves what is in it.

    Args:
        path: Where the model is to be.
        needed: How many bytes it takes, for the message when the disk is full.
    """

    def __init__(self, path: Path, needed: int = 0) -> None:
        # Through a link, as with cp: what it points to is replaced, not the link.
        self._path, self._needed = Path(os.path.realpath(path)), needed
        self._data = data_path(self._path)

    def __enter__(self) -> Self:
        try:
            # Known before the first of the two is replaced, or the second could fail alone.
            for target in (self._path, self._data):
                if target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
                if target.exists() and not target.is_file():
                    # A device or a pipe would be gone, not written to.
                    raise OSError(errno.EINVAL, "it is no regular file", str(target))
            prefix = f".{self._path.name[:200]}."
            self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self._path.parent))
        except OSError as error:
            raise _write_error(self._path, error, self._needed) from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise _write_error(self._path, error, self._needed) from error
        if isinstance(error, WriteError) and Path(error.file).parent == self._folder:
            raise error.at(str(self._path)) from error  # of the folder nobody else knows

    @property
    def model(self) -> Path:
        """Where to write the model."""
        return self._folder / self._path.name

    @property
    def data(self) -> Path:
        """Where to write its external data."""
        return self._folder / self._data.name

    def publish(self) -> None:
        """Move what was written to its place, the model last."""
        for made, target in ((self.data, self._data), (self.model, self._path)):
            if made.exists():
                if target.exists():
                    shutil.copymode(target, made)
                made.replace(target)


def _write_error(path: Path, error: OSError, needed: int) -> WriteError:
    if error.errno in _FULL:
        full = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        met = f"{full}: {needed:,} bytes are needed"
        return WriteError(met, file=str(path), todo="free some space or choose another output")
    if isinstance(error, IsADirectoryError):
        place = str(error.filename or path)
        return WriteError("it is a directory", file=place, todo="give the path of a file")
    if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
        met = f"the folder {path.parent} does not exist"
        return WriteError(met, file=str(path), todo="make it first")
    met = f"it can't be written: {error.strerror or error}"
    return WriteError(met, file=str(path), todo="choose another output")
