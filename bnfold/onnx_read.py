"""Reading an ONNX file without its weights, and saying in one line what is wrong with it.

An initializer's raw data lies in one piece in the file. So the file is cut along the wire format,
and every large initializer is read as an *external* tensor whose file is the model itself: what is
parsed is small, and a weight is read when somebody asks for it.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from bnfold import protobuf_wire as wire
from bnfold.errors import InvalidModelError, ReadError
from bnfold.onnx_external import OWN_FILE, external_files
from bnfold.onnx_shapes import Inferred
from bnfold.onnx_valid import check_and_infer, known_versions

LARGE_BYTES = 1024  # an initializer from this size on stays in the file


@dataclass(frozen=True, slots=True)
class Unparsed:
    """Fields that onnx-ir drops, as they stood in the file: of the model and of its main graph."""

    model: bytes = b""
    graph: bytes = b""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model as it was read; its large initializers are still in the file.

    Attributes:
        path: Where it was read.
        model: The model; large initializers are `onnx_ir.ExternalTensor` objects.
        shapes: What shape inference found for the main graph.
        data_files: The other files that it keeps weights in.
        nbytes: The size of the file and of ``data_files`` together.
        unparsed: What ``model`` lacks of the file: sparse initializers, training info and
            fields that are newer than the installed onnx.
    """

    path: Path
    model: ir.Model
    shapes: Inferred
    data_files: frozenset[Path]
    nbytes: int = 0
    unparsed: Unparsed = Unparsed()

    @property
    def external(self) -> bool:
        """Whether weights are kept in other files."""
        return bool(self.data_files)


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read the ONNX file at ``path``, leaving its weights where they are.

    Raises:
        ReadError: The file, or its external data, can't be read or is no ONNX model.
        InvalidModelError: It is one, but onnx.checker refuses it or it is too new.
    """
    path = Path(path)
    proto, unparsed = _parse(path)
    known_versions(proto, path)
    data_files = external_files(proto, path)
    shapes = check_and_infer(proto, path, external=bool(data_files))
    model = from_proto(proto, str(path))
    _place(model, path, external=bool(data_files))
    nbytes = sum(file.stat().st_size for file in (path, *data_files))
    return ModelFile(path, model, shapes, data_files, nbytes, unparsed)


def from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
    """``proto`` as onnx-ir has it.

    Raises:
        InvalidModelError: It holds something that onnx-ir does not know, such as sparse tensors.
    """
    try:
        return ir.from_proto(proto)
    except Exception as error:
        cause = error.__cause__ or error
        met = f"onnx-ir can't take it: {cause}"
        todo = "export it without sparse tensors or types that are newer than onnx-ir"
        raise InvalidModelError(met, file=name, todo=todo) from error


# ---- from bytes to a small proto ----

# Field numbers that onnx-ir reads; the rest is carried over as it is.
_PARSED_MODEL = set(onnx.ModelProto.DESCRIPTOR.fields_by_number) - {wire.MODEL_TRAINING_INFO}
_PARSED_GRAPH = set(onnx.GraphProto.DESCRIPTOR.fields_by_number) - {wire.GRAPH_SPARSE_INITIALIZER}


def _parse(path: Path) -> tuple[onnx.ModelProto, Unparsed]:
    try:
        # Asked first: opening a pipe would wait for somebody to write to it.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise ReadError(f"it is {kind}", file=str(path), todo="give the path of an ONNX file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ReadError("it is empty", file=str(path), todo="export the model again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                skeleton, unparsed = _skeleton(buffer)
        proto = onnx.ModelProto()
        proto.ParseFromString(skeleton)
    except OSError as error:
        raise ReadError(_os_error(error), file=str(path), todo="check the path") from error
    except (wire.WireError, DecodeError) as error:
        raise _not_a_model(path, error) from error
    _refuse_parts(proto, path)
    return proto, unparsed


def _refuse_parts(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse what can be parsed, as many a short text can, but is no whole model."""
    if proto.HasField("graph") and proto.opset_import:
        return
    if not proto.HasField("graph") and not proto.opset_import:
        raise _not_a_model(path, None)
    lacking = "opset import" if proto.HasField("graph") else "graph"
    met = f"the model in it has no {lacking}"
    raise InvalidModelError(met, file=str(path), todo="copy or export it again")


def _os_error(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"it can't be read: {error.strerror or error}"


_MAGIC = {
    b"\x89PNG": "a PNG image", b"PK\x03\x04": "a zip archive, such as torch.save makes",
    b"\x80\x02": "a Python pickle", b"\x1f\x8b": "a gzip file", b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF file", b"\x7fELF": "a program", b"TFL3": "a TensorFlow Lite model",
    b"\xff\xd8\xff": "a JPEG image", b"ORTM": "an ONNX Runtime (ORT format) model",
    b"\x93NUMPY": "a NumPy array", b"GGUF": "a GGUF file",
}  # fmt: skip


def _not_a_model(path: Path, error: Exception | None) -> ReadError:
    with path.open("rb") as file:
        head = file.read(512)
    found = _looks_like(head)
    # An ONNX file starts with its IR version, as field 1; then only its end can be missing.
    cut = isinstance(error, wire.WireError) and error.truncated and head[:1] == b"\x08"
    if cut and not found:
        met, todo = "it is truncated", "copy or export it again"
    else:
        met = f"it is not an ONNX model{f' but {found}' if found else ''}"
        todo = "give a file that torch.onnx.export or another exporter wrote"
    return ReadError(met, file=str(path), todo=todo)


def _looks_like(head: bytes) -> str:
    """What a file that starts with ``head`` is, if that tells."""
    for start, text in _MAGIC.items():
        if head.startswith(start) or (len(start) == 4 and head[4:8] == start):
            return text
    if head[8:10] == b'{"':
        return "a safetensors file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: the model itself was not fetched"
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < 512 else "ignore")
    except UnicodeDecodeError:
        return ""
    return "a text file" if all(c.isprintable() or c in "\t\r\n" for c in text) else ""


def _skeleton(buffer: mmap.mmap) -> tuple[bytes, Unparsed]:
    """The model with every large initializer as a reference into its own file."""
    pieces, unparsed, unparsed_graph = [], [], []
    for field in wire.fields(buffer, 0, len(buffer)):
        if field.number == wire.MODEL_GRAPH and field.is_message:
            # A message that is given twice is merged; so are its pieces when they are parsed.
            graph, more = _graph(buffer, field)
            pieces.append(wire.message(wire.MODEL_GRAPH, graph))
            unparsed_graph.append(more)
            continue
        pieces.append(buffer[field.start : field.end])
        if field.number not in _PARSED_MODEL:
            unparsed.append(pieces[-1])
    return b"".join(pieces), Unparsed(b"".join(unparsed), b"".join(unparsed_graph))


def _graph(buffer: mmap.mmap, graph: wire.Field) -> tuple[bytes, bytes]:
    pieces, unparsed = [], []
    for field in wire.fields(buffer, graph.value, graph.end):
        large = field.end - field.value >= LARGE_BYTES
        if field.number == wire.GRAPH_INITIALIZER and field.is_message and large:
            pieces.append(wire.message(wire.GRAPH_INITIALIZER, _tensor(buffer, field)))
            continue
        pieces.append(buffer[field.start : field.end])
        if field.number not in _PARSED_GRAPH:
            unparsed.append(pieces[-1])
    return b"".join(pieces), b"".join(unparsed)


_ELSEWHERE = (wire.TENSOR_EXTERNAL_DATA, wire.TENSOR_DATA_LOCATION)


def _tensor(buffer: mmap.mmap, tensor: wire.Field) -> bytes:
    found = list(wire.fields(buffer, tensor.value, tensor.end))
    raw = [field for field in found if field.number == wire.TENSOR_RAW_DATA]
    elsewhere = any(field.number in _ELSEWHERE for field in found)
    if elsewhere or len(raw) != 1 or raw[0].end - raw[0].value < LARGE_BYTES:
        return buffer[tensor.value : tensor.end]
    pieces = [buffer[f.start : f.end] for f in found if f.number != wire.TENSOR_RAW_DATA]
    entries = {"location": OWN_FILE, "offset": raw[0].value, "length": raw[0].end - raw[0].value}
    for key, value in entries.items():
        entry = onnx.StringStringEntryProto(key=key, value=str(value))
        pieces.append(wire.message(wire.TENSOR_EXTERNAL_DATA, entry.SerializeToString()))
    pieces.append(wire.enum(wire.TENSOR_DATA_LOCATION, onnx.TensorProto.EXTERNAL))
    return b"".join(pieces)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, the bodies of functions, and the subgraphs of both."""
    yield from model.graphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.graph.subgraphs()


def _place(model: ir.Model, path: Path, *, external: bool) -> None:
    """Say of every external tensor where its file is."""
    for graph in all_graphs(model) if external else (model.graph,):
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if tensor.location == OWN_FILE:
                # The model's own file needs no guard against leaving its folder.
                value.const_value = ir.ExternalTensor(
                    path.absolute(), tensor.offset, tensor.length, tensor.dtype,
                    shape=tensor.shape, name=tensor.name, doc_string=tensor.doc_string,
                    metadata_props=tensor.metadata_props,
                )  # fmt: skip
            else:
                tensor.base_dir = path.absolute().parent
        for node in graph if external else ():
            for attribute in node.attributes.values():
                if isinstance(attribute.value, ir.ExternalTensor):
                    attribute.value.base_dir = path.absolute().parent
