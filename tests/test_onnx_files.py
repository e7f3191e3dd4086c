"""Files: weights stay where they are, nothing is half-written, bad input is told in one line."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnfold
from bnfold import affine, onnx_fill
from bnfold.errors import BnfoldError, InvalidModelError, ReadError, UsageError, WriteError
from bnfold.onnx_read import read_model
from bnfold.onnx_write import write_model
from tests import nets

TEXT = """g (float[N,3,8,8] x) => (float[N,64,8,8] y) {
    c = Conv<pads = [1,1,1,1]>(x, w)
    y = BatchNormalization(c, bn_g, bn_b, bn_m, bn_v)
}"""


def net(seed: int = 0, **header: Any) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    constants = {"w": nets.weight(rng, 64, 3, 3, 3), **nets.batch_norm(rng, "bn", 64)}
    return nets.model(TEXT, constants, **header)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "net.onnx"
    onnx.save(net(), target)
    return target


@pytest.fixture
def external(tmp_path: Path) -> Path:
    target = tmp_path / "net.onnx"
    onnx.save(net(), target, save_as_external_data=True, location="net.onnx.data",
              size_threshold=0)  # fmt: skip
    return target


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(path: Path) -> dict[str, bytes]:
    proto = onnx.load(path)
    return {t.name: numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer
            if t.data_type != TensorProto.STRING}  # fmt: skip


# ---- round trips ----


def large(dtype: int, values: np.ndarray[Any, Any], name: str) -> TensorProto:
    raw = values.tobytes()
    return helper.make_tensor(name, dtype, values.shape, raw, raw=True)


def many_types() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(40, 40))
    given = [
        numpy_helper.from_array(wide.astype(np.float32), "f32"),
        numpy_helper.from_array(wide.astype(np.float16), "f16"),
        numpy_helper.from_array(wide, "f64"),
        large(TensorProto.BFLOAT16, wide.astype(ml_dtypes.bfloat16), "bf16"),
        numpy_helper.from_array(rng.integers(-9, 9, (400,)), "i64"),
        helper.make_tensor("typed", TensorProto.FLOAT, (20, 20), wide[:20, :20].ravel().tolist()),
        helper.make_tensor("int4", TensorProto.INT4, (3000,), [1, -2, 3] * 1000),
        TensorProto(
            name="words", data_type=TensorProto.STRING, dims=(2,), string_data=[b"a" * 2000, b"b"]
        ),
        helper.make_tensor("empty", TensorProto.FLOAT, (0,), []),
        helper.make_tensor("scalar", TensorProto.FLOAT, (), [2.0]),
    ]
    info = helper.make_tensor_value_info
    outputs = [info(f"o_{t.name}", t.data_type, list(t.dims)) for t in given]
    nodes = [helper.make_node("Identity", [t.name], [f"o_{t.name}"]) for t in given]
    graph = helper.make_graph(nodes, "g", [], outputs, given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("as_external", [False, True])
def test_tensors_of_every_type_come_back_bit_for_bit(tmp_path: Path, as_external: bool) -> None:
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(many_types(), source)
    file = read_model(source)
    write_model(file.model, target, external=as_external, source=file)
    assert tensors(source) == tensors(target)
    assert (tmp_path / "b.onnx.data").exists() == as_external
    onnx.checker.check_model(target, full_check=True)


def test_large_weights_stay_in_the_file(path: Path) -> None:
    weight = read_model(path).model.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert numpy_helper.to_array(net().graph.initializer[0]).tobytes() == weight.numpy().tobytes()


def test_metadata_and_names_are_kept(tmp_path: Path) -> None:
    proto = net()
    proto.producer_name, proto.domain, proto.model_version = "me", "here", 7
    proto.doc_string = "what it is"
    proto.metadata_props.add(key="author", value="somebody")
    proto.graph.doc_string = "graph"
    source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(proto, source)
    bnfold.optimize(source, target, check=False)
    folded = onnx.load(target)
    for field in ("producer_name", "domain", "model_version", "doc_string", "ir_version"):
        assert getattr(folded, field) == getattr(proto, field)
    assert folded.metadata_props == proto.metadata_props
    assert folded.opset_import == proto.opset_import
    assert folded.graph.input == proto.graph.input
    assert folded.graph.output == proto.graph.output
    assert folded.graph.name == proto.graph.name


def test_a_graph_field_given_in_two_parts_is_read_as_one(tmp_path: Path) -> None:
    proto = net()
    rest, weights = onnx.ModelProto(), onnx.ModelProto()
    rest.CopyFrom(proto)
    del rest.graph.initializer[:]
    weights.graph.initializer.extend(proto.graph.initializer)
    split = tmp_path / "split.onnx"
    split.write_bytes(weights.SerializeToString() + rest.SerializeToString())
    assert len(read_model(split).model.graph.initializers) == 5


@pytest.mark.parametrize("ir_version", [3, 4, 8])
def test_initializers_that_are_inputs_are_read(tmp_path: Path, ir_version: int) -> None:
    proto = net(ir=ir_version)
    for tensor in proto.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        proto.graph.input.append(info)
    path = tmp_path / "a.onnx"
    onnx.save(proto, path)
    report = bnfold.optimize(path, tmp_path / "b.onnx", check=False).report
    assert len(report.folded) == (1 if ir_version == 3 else 0)
    onnx.checker.check_model(tmp_path / "b.onnx", full_check=True)


def test_external_data_is_read_and_written_as_such(external: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    target = tmp_path / "out" / "folded.onnx"
    target.parent.mkdir()
    result = bnfold.optimize(external, target)
    assert result.check is not None
    assert result.check.exit_code == 0
    assert sorted(p.name for p in target.parent.iterdir()) == ["folded.onnx", "folded.onnx.data"]
    assert target.stat().st_size < 1500
    assert contents(tmp_path) == before


def test_file_to_file_gives_what_folding_in_memory_gives(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    bnfold.optimize(path, target, check=False)
    in_memory = bnfold.fold(onnx.load(path)).model
    assert tensors(target) == {
        t.name: numpy_helper.to_array(t).tobytes() for t in in_memory.graph.initializer
    }


def test_a_fold_of_a_path_holds_its_weights(path: Path) -> None:
    model = bnfold.fold(path).model
    path.unlink()
    assert all(v.const_value.numpy() is not None for v in model.graph.initializers.values())
    assert not any(
        isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values()
    )


# ---- bad input: one line, exit 5, nothing touched ----


def _with(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        proto = net()
        change(proto)
        path.write_bytes(proto.SerializeToString())

    return make


def _set(name: str, at: int, value: float) -> Callable[[Path], None]:
    def change(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[at] = value
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return _with(change)


def _shorter(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "bn_g")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:5], "bn_g"))


def _truncated(path: Path) -> None:
    path.write_bytes(net().SerializeToString()[:-500])


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", "x")


def _external(change: Callable[[TensorProto, Path], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        data = f"{path.name}.data"
        onnx.save(net(), path, save_as_external_data=True, location=data, size_threshold=0)
        proto = onnx.load(path, load_external_data=False)
        change(proto.graph.initializer[0], path.with_name(data))
        path.write_bytes(proto.SerializeToString())

    return make


def _location(text: str) -> Callable[[TensorProto, Path], object]:
    def change(tensor: TensorProto, _: Path) -> None:
        next(e for e in tensor.external_data if e.key == "location").value = text

    return change


def _link_outside(_: TensorProto, data: Path) -> None:
    outside = data.parent.parent / "outside.data"
    data.rename(outside)
    data.symlink_to(outside)


BAD: list[tuple[str, Callable[[Path], object], type[BnfoldError], str]] = [
    ("missing", lambda path: None, ReadError, "there is no such file"),
    ("directory", lambda path: path.mkdir(), ReadError, "it is a directory"),
    ("empty", lambda path: path.write_bytes(b""), ReadError, "it is empty"),
    ("text", lambda path: path.write_text("hello\n"), ReadError, "but a text file"),
    ("png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" * 9), ReadError, "a PNG image"),
    ("zip", _zip, ReadError, "a zip archive"),
    ("random", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), ReadError,
     "it is not an ONNX model"),
    ("zeros", lambda path: path.write_bytes(bytes(5000)), ReadError, "it is not an ONNX model"),
    ("truncated", _truncated, ReadError, "it is truncated"),
    ("no graph", lambda path: path.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString()),
     ReadError, "it is not an ONNX model"),
    ("opset", _with(lambda p: setattr(p.opset_import[0], "version", 999)), InvalidModelError,
     "it uses opset 999"),
    ("ir", _with(lambda p: setattr(p, "ir_version", 99)), InvalidModelError, "IR version is 99"),
    ("checker", _with(lambda p: p.graph.node[0].input.__setitem__(0, "nothing")),
     InvalidModelError, "onnx.checker refuses it"),
    ("unsorted", _with(lambda p: p.graph.node.reverse()), InvalidModelError,
     "onnx.checker refuses it"),
    ("negative variance", _set("bn_v", 3, -0.5), InvalidModelError,
     "the variance of channel 3 is -0.5"),
    ("nan variance", _set("bn_v", 7, np.nan), InvalidModelError, "variance of channel 7 is nan"),
    ("length", _with(_shorter), InvalidModelError, ""),
    ("no data", _external(lambda t, data: data.unlink()), ReadError, "is missing"),
    ("short data", _external(lambda t, data: data.write_bytes(b"short")), ReadError, "ends at"),
    ("absolute", _external(_location("/etc/passwd")), InvalidModelError, "outside its folder"),
    ("dots", _external(_location("../x.data")), InvalidModelError, "outside its folder"),
    ("link", _external(_link_outside), InvalidModelError, "outside its folder"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_told_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], kind: type[BnfoldError], words: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    source, target = folder / "bad.onnx", tmp_path / "target.onnx"
    target.write_bytes(b"what was here before")
    make(source)
    before = contents(folder)
    with pytest.raises(kind) as caught:
        bnfold.optimize(source, target, check=False)
    said = str(caught.value)
    assert words in said
    assert str(source) in said
    assert "\n" not in said
    assert "; " in said, "it says what to do"
    assert caught.value.exit_code == 5
    assert target.read_bytes() == b"what was here before"
    assert contents(folder) == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "outside.data") == [
        "in", "target.onnx",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_told(path: Path) -> None:
    path.chmod(0)
    with pytest.raises(ReadError, match="it can't be read: Permission denied"):
        bnfold.explain(path)


# ---- writing: at once or not at all ----


def test_the_output_is_never_the_input(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    link, hard = tmp_path / "link.onnx", tmp_path / "hard.onnx"
    link.symlink_to(path)
    hard.hardlink_to(path)
    for target in (path, link, hard):
        with pytest.raises(UsageError, match="the output is the input"):
            bnfold.optimize(path, target, check=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["net.onnx.data", "net"])
def test_the_output_is_never_the_data_of_the_input(tmp_path: Path, check: bool, name: str) -> None:
    source = tmp_path / "in.onnx"  # the data of a model at `net` would be written to `net.data`
    data = "net.onnx.data" if name == "net.onnx.data" else "net.data"
    onnx.save(net(), source, save_as_external_data=True, location=data, size_threshold=0)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="the output is the input"):
        bnfold.optimize(source, tmp_path / name, check=check)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("check", [True, False])
def test_a_target_that_can_not_be_written_is_told(path: Path, tmp_path: Path, check: bool) -> None:
    with pytest.raises(WriteError, match="does not exist"):
        bnfold.optimize(path, tmp_path / "no" / "out.onnx", check=check)
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="it is a directory"):
        bnfold.optimize(path, tmp_path / "folder", check=check)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), WriteError, "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), WriteError, "Input/output error"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_nothing_is_left_when_writing_breaks_off(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: bool,
    fault: BaseException, kind: type[BaseException], words: str,
) -> None:  # fmt: skip
    target = tmp_path / "out.onnx"
    target.write_bytes(b"what was here before")
    before = contents(tmp_path)

    def broken(path: Path, place: object, turn: object) -> None:
        raise fault

    monkeypatch.setattr(onnx_fill, "write_tensor", broken)
    with pytest.raises(kind, match=words) as caught:
        bnfold.optimize(path, target, check=check)
    if kind is WriteError:
        assert str(caught.value).startswith(f"{target}: ")
    assert contents(tmp_path) == before
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("as_external", [True, False])
def test_a_disk_that_is_really_full_is_told(
    tmp_path: Path, small_disk: Path, as_external: bool
) -> None:
    rng = np.random.default_rng(0)
    constants = {"w": nets.weight(rng, 64, 300, 3, 3), **nets.batch_norm(rng, "bn", 64)}
    source = tmp_path / "net.onnx"
    onnx.save(nets.model(TEXT.replace("N,3", "N,300"), constants), source,
              save_as_external_data=as_external, location="net.onnx.data")  # fmt: skip
    with pytest.raises(WriteError, match=r"the disk is full: .* bytes are needed"):
        bnfold.optimize(source, small_disk / "out.onnx", check=False)
    assert not list(small_disk.iterdir())


def test_the_mode_of_a_replaced_file_is_kept(path: Path, tmp_path: Path) -> None:
    fresh, old = tmp_path / "fresh.onnx", tmp_path / "old.onnx"
    old.write_bytes(b"")
    old.chmod(0o604)
    for target in (fresh, old):
        bnfold.optimize(path, target, check=False)
    assert stat.S_IMODE(old.stat().st_mode) == 0o604
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(fresh.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_model_that_fails_its_check_is_not_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sabotaged(*args: Any) -> Any:
        return affine.scale_rows(*args) * np.float32(1.01)

    monkeypatch.setattr("bnfold.onnx_fold.scale_rows", sabotaged)
    result = bnfold.optimize(path, tmp_path / "out.onnx")
    assert result.check is not None
    assert result.check.exit_code == 1
    assert not result.written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "out.reproducer"]


@pytest.mark.parametrize("check", [True, False])
def test_a_pipe_or_device_is_refused_and_left_as_it_is(
    check: bool, path: Path, tmp_path: Path
) -> None:
    target = tmp_path / "pipe"
    os.mkfifo(target)
    with pytest.raises(WriteError, match="it is no regular file"):
        bnfold.optimize(path, target, check=check)
    assert target.is_fifo()


@pytest.mark.parametrize("external", [True, False])
def test_a_link_stays_and_what_it_points_to_is_replaced(external: bool, tmp_path: Path) -> None:
    source, real, link = (tmp_path / name for name in ("net.onnx", "real.onnx", "link.onnx"))
    onnx.save(net(), source, save_as_external_data=external,
              location="net.onnx.data", size_threshold=0)  # fmt: skip
    real.write_bytes(b"old")
    link.symlink_to(real)
    bnfold.optimize(source, link)
    assert link.is_symlink()
    for name in (link, real):
        onnx.checker.check_model(str(name), full_check=True)
    assert (tmp_path / "real.onnx.data").exists() is external
