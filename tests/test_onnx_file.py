"""An ONNX file that is read and written again says the same; anything else is a one-line error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bnfold import onnx_fill, onnx_write
from bnfold import protobuf_wire as wire
from bnfold.errors import BnfoldError, InvalidModelError, ReadError, UsageError, WriteError
from bnfold.onnx_read import LARGE_BYTES, ModelFile, read_model
from bnfold.onnx_write import write_model

RNG = np.random.default_rng(5)
SIDE = 24  # a float32 weight of SIDE x SIDE is larger than LARGE_BYTES
BIG = RNG.normal(0, 1, (SIDE, SIDE)).astype(np.float32)


# ---- models ----


def value_info(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def model_of(*tensors: onnx.TensorProto, ir_version: int = 10, **more: Any) -> onnx.ModelProto:
    """The product x w; beside it each tensor read by an Identity whose output is a graph output."""
    weight = numpy_helper.from_array(BIG, "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")]
    outputs = [value_info("y", "n", SIDE)]
    for tensor in tensors:
        nodes.append(helper.make_node("Identity", [tensor.name], [f"{tensor.name}_out"]))
        outputs.append(value_info(f"{tensor.name}_out", *tensor.dims, kind=tensor.data_type))
    nodes += more.pop("nodes", [])
    graph = helper.make_graph(
        nodes, "g", [value_info("x", "n", SIDE), *more.pop("inputs", [])],
        [*outputs, *more.pop("outputs", [])], [weight, *tensors],
        sparse_initializer=more.pop("sparse", []),
    )  # fmt: skip
    opsets = more.pop("opset_imports", [helper.make_opsetid("", more.pop("opset", 21))])
    return helper.make_model(graph, ir_version=ir_version, opset_imports=opsets, **more)


def tensor_of(name: str, kind: int, shape: tuple[int, ...], *, raw: bool) -> onnx.TensorProto:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = RNG.integers(-8, 8, shape).astype(dtype)
    if raw:
        return numpy_helper.from_array(values, name)
    return helper.make_tensor(name, kind, shape, values.ravel())


STORED: dict[str, Callable[[], onnx.TensorProto]] = {
    "float32 raw": lambda: tensor_of("t", TensorProto.FLOAT, (40, 40), raw=True),
    "float32 as float_data": lambda: tensor_of("t", TensorProto.FLOAT, (40, 40), raw=False),
    "float32 small": lambda: tensor_of("t", TensorProto.FLOAT, (3,), raw=True),
    "float32 scalar": lambda: tensor_of("t", TensorProto.FLOAT, (), raw=True),
    "float32 empty": lambda: tensor_of("t", TensorProto.FLOAT, (0, 4), raw=True),
    "float64 raw": lambda: tensor_of("t", TensorProto.DOUBLE, (40, 40), raw=True),
    "int64 raw": lambda: tensor_of("t", TensorProto.INT64, (300,), raw=True),
    "int64 as int64_data": lambda: tensor_of("t", TensorProto.INT64, (300,), raw=False),
    "float16 raw": lambda: tensor_of("t", TensorProto.FLOAT16, (40, 40), raw=True),
    "float16 as int32_data": lambda: tensor_of("t", TensorProto.FLOAT16, (40, 40), raw=False),
    "bfloat16 raw": lambda: tensor_of("t", TensorProto.BFLOAT16, (40, 40), raw=True),
    "int4 raw": lambda: tensor_of("t", TensorProto.INT4, (41, 63), raw=True),
    "int4 as int32_data": lambda: tensor_of("t", TensorProto.INT4, (41, 63), raw=False),
    "float8 raw": lambda: tensor_of("t", TensorProto.FLOAT8E4M3FN, (40, 40), raw=True),
    "bool raw": lambda: tensor_of("t", TensorProto.BOOL, (2000,), raw=True),
    "strings": lambda: helper.make_tensor(
        "t", TensorProto.STRING, (200,), np.array([b"one \xff"] * 200)
    ),
}


# ---- what is compared ----


def content(tensor: onnx.TensorProto, folder: Path) -> tuple[Any, ...]:
    """Name, type, shape and bytes of a tensor, wherever and however it is stored."""
    if tensor.data_type == TensorProto.STRING:
        return tensor.name, tensor.data_type, tuple(tensor.dims), tuple(tensor.string_data)
    array = numpy_helper.to_array(tensor, base_dir=str(folder))
    return tensor.name, tensor.data_type, tuple(tensor.dims), array.tobytes()


def assert_same(before: Path, after: Path, *, full_check: bool = True) -> None:
    """Everything but the way tensors are stored is the same, and onnx takes the file."""
    onnx.checker.check_model(str(after), full_check=full_check)
    one, two = (onnx.load(path, load_external_data=False) for path in (before, after))
    for left, right in zip(stored(one), stored(two), strict=True):
        assert content(left, before.parent) == content(right, after.parent)
    for proto in (one, two):
        for tensor in stored(proto):
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name))
    assert without_redundant_types(one) == without_redundant_types(two)


def without_redundant_types(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Value infos of initializers say what the tensors say: they may come and go."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for opset in result.opset_import:
        opset.domain = opset.domain  # "" is the same, stated or not
    graphs = [result.graph]
    while graphs:
        graph = graphs.pop()
        given = {tensor.name for tensor in graph.initializer}
        kept = [value for value in graph.value_info if value.name not in given]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        graphs.extend(attribute.g for node in graph.node for attribute in node.attribute)
    return result


def stored(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    graphs, found = [proto.graph], []
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop(0)
            found.extend(graph.initializer)
            nodes.extend(graph.node)
        while nodes:
            for attribute in nodes.pop(0).attribute:
                found.extend([attribute.t] if attribute.HasField("t") else [])
                graphs.extend([attribute.g] if attribute.HasField("g") else [])
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


class Folders:
    """``source``, which must not change, and ``target``, which may."""

    def __init__(self, root: Path) -> None:
        self.source, self.target = root / "in", root / "out"
        self.source.mkdir()
        self.target.mkdir()
        self.model, self.out = self.source / "m.onnx", self.target / "o.onnx"

    def save(self, proto: onnx.ModelProto, **how: Any) -> Path:
        onnx.save(proto, self.model, **how)
        return self.model

    def save_external(self, proto: onnx.ModelProto, threshold: int = 0) -> Path:
        return self.save(proto, save_as_external_data=True, location="m.bin",
                         size_threshold=threshold, convert_attribute=True)  # fmt: skip

    def made(self) -> list[str]:
        return sorted(path.name for path in self.target.iterdir())


@pytest.fixture
def at(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


@contextlib.contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = hashes(folder)
    yield
    assert hashes(folder) == before


def copied(at: Folders, *, external: bool | None = None) -> ModelFile:
    """Read and write; the input stays as it is and so does the model in memory."""
    with unchanged(at.source):
        file = read_model(at.model)
        held = {name: v.const_value for name, v in file.model.graph.initializers.items()}
        write_model(file.model, at.out, source=file,
                    external=file.external if external is None else external)  # fmt: skip
        now = {name: v.const_value for name, v in file.model.graph.initializers.items()}
        assert all(now[name] is tensor for name, tensor in held.items())
        assert now.keys() == held.keys()
    return file


# ---- round trips ----


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("case", STORED)
def test_every_way_to_store_a_tensor_survives_bit_for_bit(
    at: Folders, case: str, external: bool
) -> None:
    at.save(model_of(STORED[case]()))
    copied(at, external=external)
    assert_same(at.model, at.out)
    assert at.made() == (["o.onnx", "o.onnx.data"] if external else ["o.onnx"])


@pytest.mark.parametrize("external", [False, True], ids=["to inline", "to external"])
@pytest.mark.parametrize("threshold", [0, LARGE_BYTES], ids=["all external", "large external"])
@pytest.mark.parametrize("case", ["float32 raw", "float32 small", "float32 empty", "int4 raw"])
def test_external_data_survives_and_the_result_needs_no_file_of_the_input(
    at: Folders, case: str, threshold: int, external: bool
) -> None:
    at.save_external(model_of(STORED[case]()), threshold)
    file = copied(at, external=external)
    assert file.external
    assert file.nbytes == sum(path.stat().st_size for path in at.source.iterdir())
    assert_same(at.model, at.out)
    shutil.rmtree(at.source)
    onnx.load(at.out)
    data = {entry.value for tensor in stored(onnx.load(at.out, load_external_data=False))
            for entry in tensor.external_data if entry.key == "location"}  # fmt: skip
    assert data == ({"o.onnx.data"} if external else set())


def test_a_model_with_small_tensors_alone_gets_no_data_file(at: Folders) -> None:
    proto = model_of()
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(BIG[:, :1], "w"))
    proto.graph.output[0].CopyFrom(value_info("y", "n", 1))
    at.save(proto)
    copied(at, external=True)
    assert at.made() == ["o.onnx"]
    assert_same(at.model, at.out)


def test_large_weights_stay_in_the_file(at: Folders) -> None:
    file = read_model(at.save(model_of(STORED["float32 small"]())))
    held = file.model.graph.initializers
    assert isinstance(held["w"].const_value, ir.ExternalTensor)
    assert not isinstance(held["t"].const_value, ir.ExternalTensor)
    assert np.array_equal(held["w"].const_value.numpy(), BIG)
    assert not file.external
    assert file.nbytes == at.model.stat().st_size


def sparse(name: str) -> onnx.SparseTensorProto:
    values = helper.make_tensor(name, TensorProto.FLOAT, (400,), np.arange(400, dtype=np.float32))
    indices = helper.make_tensor(f"{name}_at", TensorProto.INT64, (400,), np.arange(400) * 2)
    return helper.make_sparse_tensor(values, indices, (SIDE, 40))


def test_sparse_initializers_survive(at: Folders) -> None:
    node = helper.make_node("MatMul", ["x", "s"], ["z"])
    proto = model_of(nodes=[node], sparse=[sparse("s")], outputs=[value_info("z", "n", 40)])
    at.save(proto)
    copied(at)
    assert onnx.load(at.out).graph.sparse_initializer == proto.graph.sparse_initializer
    # Shape inference takes a sparse initializer for a scalar, in the original as well.
    assert_same(at.model, at.out, full_check=False)


def test_what_onnx_ir_can_not_hold_is_refused_with_its_words(at: Folders) -> None:
    node = helper.make_node("Constant", [], ["s"], sparse_value=sparse("s"))
    user = helper.make_node("MatMul", ["x", "s"], ["z"])
    at.save(model_of(nodes=[node, user], outputs=[value_info("z", "n", 40)]))
    refused(at.model, InvalidModelError, "onnx-ir can't take it")


@pytest.mark.parametrize(("ir_version", "opset"), [(3, 9), (8, 17)], ids=["IR 3", "IR 8"])
def test_initializers_that_are_graph_inputs_stay_both(
    at: Folders, ir_version: int, opset: int
) -> None:
    tensor = STORED["float32 raw"]()
    inputs = [value_info("w", SIDE, SIDE), value_info("t", 40, 40)]
    at.save(model_of(tensor, ir_version=ir_version, opset=opset, inputs=inputs))
    copied(at)
    assert_same(at.model, at.out)


def test_names_metadata_and_value_infos_survive(at: Folders) -> None:
    proto = model_of(doc_string="doc", producer_name="p", producer_version="1", model_version=7)
    proto.domain = "d"
    helper.set_model_props(proto, {"author": "somebody"})
    proto.graph.doc_string = "graph"
    proto.graph.node[0].doc_string = "node"
    proto.graph.initializer[0].doc_string = "tensor"
    proto.graph.node.append(helper.make_node("Relu", ["y"], ["r"]))
    proto.graph.node.append(helper.make_node("Neg", ["r"], ["q"]))
    proto.graph.output.append(value_info("q", "n", SIDE))
    proto.graph.value_info.append(value_info("r", "n", SIDE))
    at.save(proto)
    copied(at)
    assert_same(at.model, at.out)
    assert onnx.load(at.out).graph.initializer[0].doc_string == "tensor"


def nested_model() -> onnx.ModelProto:
    """An If whose branches hold large tensors, a Constant node and a function that hold one."""
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("MatMul", ["y", f"w_{name}"], [f"{name}_out"])],
            name, [], [value_info(f"{name}_out", "n", SIDE)],
            [numpy_helper.from_array(BIG + number, f"w_{name}")],
        )
        for number, name in enumerate(("then", "else"))
    }  # fmt: skip
    constant = numpy_helper.from_array(BIG * 2, "c_value")
    inner = numpy_helper.from_array(BIG * 3, "k_value")
    function = helper.make_function(
        "own", "Scale", ["a"], ["b"],
        [helper.make_node("Constant", [], ["k"], value=inner),
         helper.make_node("MatMul", ["a", "k"], ["b"])],
        [helper.make_opsetid("", 21)],
    )  # fmt: skip
    nodes = [
        helper.make_node("If", ["which"], ["z"], **branches),
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("MatMul", ["z", "c"], ["v"]),
        helper.make_node("Scale", ["v"], ["u"], domain="own"),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return model_of(
        nodes=nodes, inputs=[value_info("which", kind=TensorProto.BOOL)], functions=[function],
        outputs=[value_info("u", "n", SIDE)], opset_imports=opsets,
    )  # fmt: skip


@pytest.mark.parametrize("external", [False, True], ids=["to inline", "to external"])
@pytest.mark.parametrize("given_external", [False, True], ids=["from inline", "from external"])
def test_tensors_of_subgraphs_constants_and_functions_survive(
    at: Folders, given_external: bool, external: bool
) -> None:
    proto = nested_model()
    if given_external:
        at.save_external(proto)
    else:
        at.save(proto)
    copied(at, external=external)
    assert_same(at.model, at.out)
    shutil.rmtree(at.source)
    onnx.load(at.out)


def shuffled(proto: onnx.ModelProto) -> bytes:
    """The same model with the fields of each level in another order and the graph in two parts."""
    whole = proto.SerializeToString()
    parts = []
    for field in wire.fields(whole, 0, len(whole)):
        if field.number != wire.MODEL_GRAPH:
            parts.append(whole[field.start : field.end])
            continue
        inner = [whole[f.start : f.end] for f in wire.fields(whole, field.value, field.end)]
        inner.sort(key=len, reverse=True)
        parts.append(wire.message(wire.MODEL_GRAPH, b"".join(inner[: len(inner) // 2])))
        parts.append(wire.message(wire.MODEL_GRAPH, b"".join(inner[len(inner) // 2 :])))
    return b"".join(reversed(parts))


def test_the_order_of_fields_and_a_graph_in_two_parts_make_no_difference(at: Folders) -> None:
    data = shuffled(model_of(STORED["float32 raw"](), STORED["strings"]().__class__.FromString(
        tensor_of("i", TensorProto.INT64, (300,), raw=False).SerializeToString())))  # fmt: skip
    at.model.write_bytes(data)
    onnx.checker.check_model(str(at.model), full_check=True)
    assert data.count(wire.varint(wire.MODEL_GRAPH << 3 | 2)) >= 2
    copied(at)
    assert_same(at.model, at.out)


def test_raw_data_given_twice_is_the_last(at: Folders) -> None:
    proto = model_of()
    tensor = proto.graph.initializer[0]
    first = wire.message(wire.TENSOR_RAW_DATA, b"\1" * len(tensor.raw_data))
    twice = wire.message(wire.GRAPH_INITIALIZER, first + tensor.SerializeToString())
    del proto.graph.initializer[:]
    at.model.write_bytes(proto.SerializeToString() + wire.message(wire.MODEL_GRAPH, twice))
    copied(at)
    assert_same(at.model, at.out)


def test_fields_newer_than_the_installed_onnx_survive(at: Folders) -> None:
    proto = model_of()
    new_model, new_graph = wire.message(900, b"model"), wire.message(901, b"graph")
    tail = new_model + wire.message(wire.MODEL_GRAPH, new_graph)
    at.model.write_bytes(proto.SerializeToString() + tail)
    copied(at)
    data = at.out.read_bytes()
    assert new_model in data
    assert new_graph in data


def test_shapes_are_inferred_and_not_written(at: Folders) -> None:
    relu = helper.make_node("Relu", ["y"], ["r"])
    neg = helper.make_node("Neg", ["r"], ["q"])
    at.save(model_of(nodes=[relu, neg], outputs=[value_info("q", "n", SIDE)]))
    file = copied(at)
    assert file.shapes["r"] == (TensorProto.FLOAT, ("n", SIDE))
    assert not onnx.load(at.out).graph.value_info


# ---- what can't be read ----


def safetensors() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + b"\0\0\0\0"


NOT_A_MODEL: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "text": ("a text, für alle\n".encode(), "not an ONNX model but a text file"),
    "text of protobuf's bytes": (b"hello", "not an ONNX model but a text file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "a PNG image"),
    "zip": (b"PK\x03\x04" + bytes(64), "a zip archive, such as torch.save makes"),
    "pickle": (b"\x80\x02}q\x00." + bytes(64), "a Python pickle"),
    "safetensors": (safetensors(), "a safetensors file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "random bytes": (np.random.default_rng(1).bytes(4096), "it is not an ONNX model"),
    "zeros": (bytes(4096), "it is not an ONNX model"),
}


def refused(path: Path, kind: type[BnfoldError], words: str) -> BnfoldError:
    """The one-line error of reading ``path``."""
    with pytest.raises(kind) as caught:
        read_model(path)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    assert str(path) in text
    assert caught.value.todo
    assert caught.value.exit_code == 5
    return caught.value


@pytest.mark.parametrize("case", NOT_A_MODEL)
def test_a_file_that_is_no_model_is_refused_with_what_it_is(at: Folders, case: str) -> None:
    data, words = NOT_A_MODEL[case]
    at.model.write_bytes(data)
    with unchanged(at.source):
        refused(at.model, ReadError, words)


def test_a_path_that_is_no_file_is_refused(at: Folders) -> None:
    refused(at.model, ReadError, "there is no such file")
    refused(at.source, ReadError, "it is a directory")
    pipe = at.source / "pipe"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)  # or whoever opens it waits for ever
    try:
        refused(pipe, ReadError, "it is no regular file")
    finally:
        os.close(held)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(at: Folders) -> None:
    at.save(model_of())
    at.model.chmod(0)
    refused(at.model, ReadError, "Permission denied")


def test_a_file_that_fails_to_be_read_is_refused(
    at: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    at.save(model_of())
    monkeypatch.setattr(Path, "open", denied)
    refused(at.model, ReadError, "can't be read: Permission denied")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_a_truncated_model_is_refused(at: Folders, share: float) -> None:
    whole = model_of().SerializeToString()
    at.model.write_bytes(whole[: max(3, int(len(whole) * share))])
    refused(at.model, ReadError, "it is truncated")


@pytest.mark.parametrize(
    ("part", "words"), [("graph", "has no graph"), ("opset_import", "has no opset import")]
)
def test_a_model_without_a_part_is_refused(at: Folders, part: str, words: str) -> None:
    proto = model_of()
    proto.ClearField(part)
    at.save(proto)
    refused(at.model, InvalidModelError, words)


def test_a_model_newer_than_onnx_is_refused_with_both_numbers(at: Folders) -> None:
    newest = onnx.defs.onnx_opset_version()
    at.save(model_of(opset=newest + 1))
    error = refused(at.model, InvalidModelError, f"opset {newest + 1}")
    assert str(newest) in str(error).replace(str(newest + 1), "")
    assert "pip install -U onnx" in str(error)
    at.save(model_of(ir_version=onnx.IR_VERSION + 1))
    error = refused(at.model, InvalidModelError, f"IR version is {onnx.IR_VERSION + 1}")
    assert "pip install -U onnx" in str(error)


def with_entry(proto: onnx.ModelProto, key: str, value: str | None) -> onnx.ModelProto:
    """The external tensor w with another entry, or without it."""
    tensor = proto.graph.initializer[0]
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    for name, text in [*kept, *([(key, value)] if value is not None else [])]:
        tensor.external_data.add(key=name, value=text)
    return proto


EXTERNAL_FAULTS: dict[str, tuple[str, str | None, type[BnfoldError], str]] = {
    "missing": ("location", "gone.bin", ReadError, "is missing"),
    "absolute": ("location", "/etc/hosts", InvalidModelError, "points outside its folder"),
    "parent": ("location", "../m.bin", InvalidModelError, "points outside its folder"),
    "dots inside": ("location", "a/../../m.bin", InvalidModelError, "points outside its folder"),
    "empty": ("location", "", InvalidModelError, "points outside its folder"),
    "link": ("location", "link.bin", InvalidModelError, "points outside its folder"),
    "hard link": ("location", "hard.bin", ReadError, "several hard links"),
    "beyond the end": ("offset", "8", ReadError, "ends at byte"),
    "beyond the end, length unsaid": ("length", None, ReadError, "ends at byte"),
    "too long": ("length", str(SIDE * SIDE * 4 + 4), InvalidModelError, "takes 2304 bytes"),
    "negative": ("offset", "-4", InvalidModelError, "at offset -4"),
    "no number": ("offset", "many", InvalidModelError, "no number"),
}


@pytest.mark.parametrize("case", EXTERNAL_FAULTS)
def test_external_data_that_is_not_there_is_refused(at: Folders, case: str) -> None:
    key, value, kind, words = EXTERNAL_FAULTS[case]
    proto = onnx.load(at.save_external(model_of()), load_external_data=False)
    data = at.source / "m.bin"
    (at.target / "m.bin").write_bytes(data.read_bytes())
    (at.source / "link.bin").symlink_to(at.target / "m.bin")
    shutil.copy(data, at.target / "other.bin")
    os.link(at.target / "other.bin", at.source / "hard.bin")
    if "unsaid" in case:
        data.write_bytes(data.read_bytes()[:-1])
    at.model.write_bytes(with_entry(proto, key, value).SerializeToString())
    with unchanged(at.source):
        assert "'w'" in str(refused(at.model, kind, words))


def test_raw_data_of_another_size_than_the_shape_is_refused(at: Folders) -> None:
    proto = model_of()
    proto.graph.initializer[0].raw_data += b"\0\0\0\0"
    at.save(proto)
    assert "'w'" in str(refused(at.model, InvalidModelError, "takes 2304 bytes"))
    proto.graph.initializer[0].raw_data = b"\0" * 2000
    at.save(proto)
    refused(at.model, InvalidModelError, "takes 2304 bytes")


def test_a_model_that_the_checker_refuses_is_refused_with_its_words(at: Folders) -> None:
    bad = helper.make_node("Relu", ["y"], ["r"], name="bad relu", alpha=1.0)
    at.save(model_of(nodes=[bad]))
    refused(at.model, InvalidModelError, "Unrecognized attribute: alpha")
    at.save(model_of(nodes=[helper.make_node("Relu", ["nowhere"], ["r"], name="lost")]))
    refused(at.model, InvalidModelError, "nowhere")


def test_a_contradiction_of_shapes_is_refused(at: Folders) -> None:
    proto = model_of()
    proto.graph.output[0].CopyFrom(value_info("y", "n", SIDE + 1))
    at.save(proto)
    refused(at.model, InvalidModelError, "onnx.checker refuses it")


@pytest.mark.parametrize("given", ["declared", "contradicting"])
def test_a_custom_operator_is_accepted(at: Folders, given: str) -> None:
    nodes = [helper.make_node("Magic", ["y"], ["m"], domain="com.example"),
             helper.make_node("Relu", ["m"], ["r"])]  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.example", 1)]
    proto = model_of(nodes=nodes, outputs=[value_info("r", 7)], opset_imports=opsets)
    if given == "contradicting":
        proto.graph.output[0].CopyFrom(value_info("y", "n", SIDE + 1))
    at.save(proto)
    file = read_model(at.model)
    write_model(file.model, at.out, source=file)
    assert onnx.load(at.out).graph.node[1].domain == "com.example"


# ---- what can't be written ----


def test_writing_over_the_input_is_refused_under_any_name(at: Folders) -> None:
    at.save_external(model_of())
    (at.target / "hard.onnx").hardlink_to(at.model)
    (at.target / "soft.onnx").symlink_to(at.model)
    (at.target / "data.onnx.data").symlink_to(at.source / "m.bin")
    file = read_model(at.model)
    for path in (at.model, at.target / "hard.onnx", at.target / "soft.onnx",
                 at.target / "data.onnx", at.source / "m.bin",
                 at.source / ".." / "in" / "m.onnx"):  # fmt: skip
        with unchanged(at.source), pytest.raises(UsageError, match="the output is the input"):
            write_model(file.model, path, external=True, source=file)


def failed_write(at: Folders, path: Path, words: str) -> None:
    at.save(model_of())
    file = read_model(at.model)
    before = at.made()
    with unchanged(at.source), pytest.raises(WriteError) as caught:
        write_model(file.model, path, source=file, external=True)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert at.made() == before


def test_an_output_that_can_not_be_is_refused(at: Folders) -> None:
    failed_write(at, at.target / "none" / "o.onnx", "does not exist")
    (at.target / "dir.onnx").mkdir()
    failed_write(at, at.target / "dir.onnx", "is a directory")
    (at.target / "d.onnx.data").mkdir()
    failed_write(at, at.target / "d.onnx", "is a directory")
    (at.target / "file").write_text("x")
    failed_write(at, at.target / "file" / "o.onnx", "can't be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(at: Folders) -> None:
    at.target.chmod(0o500)
    failed_write(at, at.out, "Permission denied")


def lazily(model: ir.Model, compute: Callable[[], NDArray[Any]], *more: str) -> None:
    """Make the weights w and ``more`` tensors that are computed when they are written."""
    for name in ("w", *more):
        old = model.graph.initializers[name].const_value
        assert old is not None
        model.graph.initializers[name].const_value = ir.LazyTensor(
            lambda: ir.tensor(compute()), dtype=old.dtype, shape=ir.Shape(old.shape.numpy()),
            name=name,
        )  # fmt: skip


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


FAILURES: dict[str, tuple[BaseException, type[BaseException], str]] = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), WriteError, "bytes are needed"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), WriteError, "bytes are needed"),
    "interrupt": (KeyboardInterrupt("^C"), KeyboardInterrupt, "C"),
    "bug": (RuntimeError("bug"), RuntimeError, "bug"),
}


@pytest.mark.parametrize("kept", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_write_that_fails_midway_leaves_nothing(
    at: Folders, monkeypatch: pytest.MonkeyPatch, case: str, external: bool, kept: bool
) -> None:
    error, kind, words = FAILURES[case]
    at.save(model_of(STORED["float32 raw"]()))
    if kept:
        at.out.write_bytes(b"older")
        (at.target / "o.onnx.data").write_bytes(b"older data")
    file = read_model(at.model)
    original = onnx_fill.write_tensor
    written: list[str | None] = []

    def second_fails(path: Path, place: Any, turn: Any) -> None:
        original(path, place, turn)
        written.append(place.tensor.name)
        if len(written) == 2:
            assert path.stat().st_size > BIG.nbytes  # it is half-written now
            raise error

    monkeypatch.setattr(onnx_fill, "_THREADS", 1)
    monkeypatch.setattr(onnx_fill, "write_tensor", second_fails)
    with unchanged(at.source), unchanged(at.target), pytest.raises(kind, match=words):
        write_model(file.model, at.out, external=external, source=file)
    assert at.made() == (["o.onnx", "o.onnx.data"] if kept else [])
    assert len(written) == 2


@pytest.mark.parametrize("error", [UsageError("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_what_computing_a_weight_raises_passes_through(at: Folders, error: BaseException) -> None:
    at.save(model_of(STORED["float32 raw"]()))
    file = read_model(at.model)
    lazily(file.model, raising(error), "t")
    with unchanged(at.source), pytest.raises(type(error)) as caught:
        write_model(file.model, at.out, source=file)
    assert caught.value is error
    assert at.made() == []


@pytest.mark.parametrize("place", ["small", "subgraph"])
def test_what_computing_a_weight_outside_the_stream_raises_passes_through(
    at: Folders, place: str
) -> None:
    at.save(nested_model() if place == "subgraph" else model_of(STORED["float32 small"]()))
    file = read_model(at.model)
    graph = list(file.model.graphs())[1 if place == "subgraph" else 0]
    value = graph.initializers["t" if place == "small" else next(iter(graph.initializers))]
    old = value.const_value
    assert old is not None
    error = UsageError("no")
    value.const_value = ir.LazyTensor(
        raising(error), dtype=old.dtype, shape=ir.Shape(old.shape.numpy()), name=value.name
    )
    with pytest.raises(UsageError) as caught:
        write_model(file.model, at.out, source=file)
    assert caught.value is error
    assert at.made() == []


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_computed_weights_are_written_in_their_place(at: Folders, external: bool) -> None:
    names = [f"t{number}" for number in range(20)]
    tensors = [numpy_helper.from_array(BIG * i, name) for i, name in enumerate(names)]
    at.save(model_of(*tensors))
    file = read_model(at.model)
    for number, name in enumerate(names[::2]):
        value = file.model.graph.initializers[name]
        made = (BIG + number).astype(np.float32)
        value.const_value = ir.LazyTensor(
            lambda made=made: ir.tensor(made),  # type: ignore[misc]
            dtype=ir.DataType.FLOAT, shape=ir.Shape(BIG.shape), name=name,
        )  # fmt: skip
    write_model(file.model, at.out, source=file, external=external)
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(at.out).graph.initializer}
    assert np.array_equal(found["w"], BIG)
    for number in range(20):
        expected = BIG * number if number % 2 else BIG + number // 2
        assert np.array_equal(found[f"t{number}"], expected.astype(np.float32)), number


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.int4, np.float64])
def test_a_computed_weight_of_any_type_is_written(at: Folders, dtype: Any) -> None:
    values = RNG.integers(-8, 8, (80, 41)).astype(dtype)
    at.save(model_of(numpy_helper.from_array(np.zeros_like(values), "t")))
    file = read_model(at.model)
    lazily(file.model, lambda: BIG)
    old = file.model.graph.initializers["t"].const_value
    assert old is not None
    file.model.graph.initializers["t"].const_value = ir.LazyTensor(
        lambda: ir.tensor(values, dtype=old.dtype), dtype=old.dtype, shape=ir.Shape(values.shape)
    )
    write_model(file.model, at.out, source=file)
    found = onnx.load(at.out).graph.initializer[1]
    assert found.name == "t"
    assert numpy_helper.to_array(found).tobytes() == values.tobytes()


def test_no_more_weights_are_computed_at_a_time_than_there_are_threads(at: Folders) -> None:
    names = [f"t{number}" for number in range(12)]
    at.save(model_of(*(numpy_helper.from_array(BIG, name) for name in names)))
    file = read_model(at.model)
    alive, most, guard = [0], [0], threading.Lock()

    def freed() -> None:
        with guard:
            alive[0] -= 1

    def compute() -> NDArray[Any]:
        made = BIG.copy()
        weakref.finalize(made, freed)
        with guard:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return made

    lazily(file.model, compute, *names)
    write_model(file.model, at.out, source=file)
    assert 1 <= most[0] <= onnx_fill._THREADS + 1  # one may be on its way out


def test_progress_ends_at_the_total(at: Folders) -> None:
    at.save(model_of(STORED["float32 raw"]()))
    file = read_model(at.model)
    told: list[tuple[int, int]] = []
    write_model(file.model, at.out, source=file, on_progress=lambda *now: told.append(now))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (BIG.nbytes + 6400, BIG.nbytes + 6400)


def test_what_is_too_large_for_one_file_is_written_with_external_data(
    at: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    at.save(model_of(STORED["float32 raw"]()))
    monkeypatch.setattr(onnx_write, "_PROTO_LIMIT", 4000)
    copied(at)
    assert at.made() == ["o.onnx", "o.onnx.data"]
    assert_same(at.model, at.out)


def test_without_copy_file_range_the_result_is_the_same(
    at: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    at.save(model_of(STORED["float32 raw"]()))
    monkeypatch.setattr(os, "copy_file_range", raising(OSError(errno.EXDEV, "cross-device")))
    copied(at)
    assert_same(at.model, at.out)


def test_a_source_that_vanishes_before_it_is_written_is_named(at: Folders) -> None:
    at.save(model_of())
    file = read_model(at.model)
    at.model.unlink()
    with pytest.raises(ReadError, match="is gone") as caught:
        write_model(file.model, at.out, source=file)
    assert str(at.model) in str(caught.value)
    assert at.made() == []


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_permissions_are_those_of_a_new_file_or_of_the_replaced_one(at: Folders, mode: int) -> None:
    at.save_external(model_of())
    umask = os.umask(0o027)
    try:
        copied(at)
        assert [path.stat().st_mode & 0o777 for path in at.target.iterdir()] == [0o640, 0o640]
    finally:
        os.umask(umask)
    at.out.chmod(mode)
    copied(at)
    assert at.out.stat().st_mode & 0o777 == mode


def test_replacing_is_at_once(at: Folders) -> None:
    """Who has the old file open reads on in the old file."""
    at.save(model_of())
    at.out.write_bytes(b"older")
    with at.out.open("rb") as older:
        copied(at)
        assert older.read() == b"older"
    assert_same(at.model, at.out)


@pytest.mark.skipif(sys.platform != "linux", reason="the measure is of Linux")
def test_a_large_model_is_never_in_memory(at: Folders) -> None:
    """Sabotage: the same measure over onnx.load and onnx.save must see the whole model."""
    size = 64 << 20
    shape = (size // 4 // 1024, 1024)
    weight = helper.make_tensor("w", TensorProto.FLOAT, shape, bytes(size), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [value_info("x", "n", shape[0])], [value_info("y", "n", shape[1])], [weight],
    )  # fmt: skip
    at.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    lean = "f = read_model(source); write_model(f.model, target, source=f)"
    assert grown(lean, at) < size // 4
    assert grown("onnx.save(onnx.load(source), target)", at) > size


def grown(statements: str, at: Folders) -> int:
    """By how many bytes the peak memory of a fresh process grows in ``statements``."""
    script = f"""
import onnx, onnx.checker
from bnfold.onnx_read import read_model
from bnfold.onnx_write import write_model
def peak():  # ru_maxrss would count what the process that started this one held
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
source, target = {str(at.model)!r}, {str(at.out)!r}
before = peak()
{statements}
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return int(done.stdout)
