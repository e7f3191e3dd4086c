"""Pairs, inputs and machines that can't be checked: a clear error and the right exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import bnfold
from bnfold.cli import main
from bnfold.errors import BnfoldError, InconclusiveError, InvalidModelError
from bnfold.verify import memory
from bnfold.verify.customops import require_known_operators
from bnfold.verify.memory import available_bytes, float64_bytes, memory_guard, require_memory

HEAD = '<ir_version: 10, opset_import: ["" : 21, "my.ops" : 1]>'
GOOD = "(float[1, 4] x) => (float[1, 4] y) { y = Neg(x) }"

TWO_OUTPUTS = "(float[1, 4] x) => (float[1, 4] w, float[1, 4] v) { w = Neg(x) v = Abs(x) }"


def model(graph: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEAD} g {graph}")


def saved(folder: Path, name: str, graph: str) -> Path:
    onnx.save(model(graph), folder / name)
    return folder / name


def other(graph: str) -> Callable[[Path], list[str]]:
    """The good model against another one."""
    return lambda folder: [
        str(saved(folder, "a.onnx", GOOD)), str(saved(folder, "b.onnx", graph))
    ]  # fmt: skip


def bytes_as_reference(content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "a.onnx").write_bytes(content)
        return [str(folder / "a.onnx"), str(saved(folder, "b.onnx", GOOD))]

    return make


def a_folder(folder: Path) -> list[str]:
    (folder / "a.onnx").mkdir()
    return [str(folder / "a.onnx"), str(saved(folder, "b.onnx", GOOD))]


def with_inputs(
    **arrays: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        np.savez(folder / "in.npz", **arrays)  # type: ignore[arg-type]  # of keywords
        twice = "(float[1, 4] x) => (float[1, 4] y) { a = Neg(x) b = Neg(a) y = Neg(b) }"
        return [*other(twice)(folder), "--inputs", str(folder / "in.npz")]

    return make


WHOLE = model(GOOD).SerializeToString()
NAN = np.array([[0, 1, 2, 3], [0, 1, np.nan, 3]], np.float32)

# What is handed in, the exit code, and what the one line names.
BAD: dict[str, tuple[Callable[[Path], list[str]], int, tuple[str, ...]]] = {
    "another name": (
        other("(float[1, 4] z) => (float[1, 4] y) { y = Neg(z) }"), 2,
        ("b.onnx", "only the names", "'z' is 'x'"),
    ),
    "another type": (
        other("(double[1, 4] x) => (float[1, 4] y) { y = Cast<to = 1>(x) }"), 2,
        ("b.onnx", "input 'x' is float64[1, 4], not float32[1, 4]"),
    ),
    "another size": (
        other("(float[1, 5] x) => (float[1, 5] y) { y = Neg(x) }"), 2,
        ("b.onnx", "input 'x' is float32[1, 5], not float32[1, 4]"),
    ),
    "another rank": (
        other("(float[1, 2, 2] x) => (float[1, 4] y) { y = Flatten(x) }"), 2,
        ("b.onnx", "input 'x' is float32[1, 2, 2], not float32[1, 4]"),
    ),
    "one input more": (
        other("(float[1, 4] x, float[1] z) => (float[1, 4] y) { y = Neg(x) }"), 2,
        ("b.onnx", "input 'z' is not in the reference"),
    ),
    "another output": (other(TWO_OUTPUTS), 2, ("b.onnx", "output 'y' is missing")),
    "an output that is no tensor": (
        other("(float[1, 4] x) => (seq(float[1, 4]) y) { y = SequenceConstruct(x) }"), 2,
        ("b.onnx", "output 'y' is sequence, not float32[1, 4]"),
    ),
    "NaN inputs": (with_inputs(x=NAN), 2, ("input 'x' is NaN at [0, 2] of sample 1",)),
    "inputs of another shape": (
        with_inputs(x=np.zeros((2, 5), np.float32)), 2, ("input 'x' has shape [2, 5]",),
    ),
    "inputs of another name": (
        with_inputs(q=np.zeros((2, 4), np.float32)), 2, ("input 'q' is no input", "inputs are x"),
    ),
    "no outputs": (
        lambda folder: [
            str(saved(folder, "a.onnx", "(float[1, 4] x) => () { y = Neg(x) }")),
            str(saved(folder, "b.onnx", GOOD)),
        ], 5, ("a.onnx", "no outputs"),
    ),
    "a truncated file": (bytes_as_reference(WHOLE[:-9]), 5, ("a.onnx",)),
    "an empty file": (bytes_as_reference(b""), 5, ("a.onnx", "empty")),
    "a picture": (bytes_as_reference(b"\x89PNG\r\n\x1a\n"), 5, ("a.onnx", "PNG")),
    "text": (bytes_as_reference(b"not a model at all"), 5, ("a.onnx",)),
    "a folder": (a_folder, 5, ("a.onnx", "directory")),
    "no file": (
        lambda folder: [str(folder / "a.onnx"), str(saved(folder, "b.onnx", GOOD))], 5,
        ("a.onnx", "no such file"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_is_one_clear_line_with_its_exit_code(case: str, tmp_path: Path) -> None:
    make, code, words = BAD[case]
    arguments = make(tmp_path)
    done = CliRunner().invoke(main, ["check", *arguments])
    assert done.exit_code == code, done.output
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("bnfold:")]
    assert all(word in line for word in words), line
    assert "internal error" not in line

    inputs = arguments[3] if len(arguments) > 2 else None
    with pytest.raises(BnfoldError) as caught:
        bnfold.check(arguments[0], arguments[1], inputs=inputs).raise_for_status()
    assert caught.value.exit_code == code
    assert str(caught.value) in line


# ---- operators that nobody has ----

CUSTOM = "(float[1, 4] x) => (float[1, 4] y) { [odd] y = my.ops.Odd(x) }"


def test_a_missing_custom_operator_is_inconclusive_and_named(tmp_path: Path) -> None:
    changed = "(float[1, 4] x) => (float[1, 4] y) { [odd] z = my.ops.Odd(x) y = Neg(z) }"
    paths = [str(saved(tmp_path, "a.onnx", CUSTOM)), str(saved(tmp_path, "b.onnx", changed))]
    done = CliRunner().invoke(main, ["check", *paths])
    assert done.exit_code == 3, done.output
    for word in ("a.onnx", "node 'odd'", "'Odd'", "'my.ops'", "--tiers A"):
        assert word in done.stderr


OPERATORS = {
    "(float[1, 4] x) => (float[1, 4] y) { y = Neg(x) }": "",
    "(float[1, 4] x) => (float[1, 4] y) { y = com.microsoft.Gelu(x) }": "",
    CUSTOM: "m.onnx: node 'odd': operator 'Odd' of domain 'my.ops' is a custom one",
    "(float[1] x) => (float[1] y) { a = my.ops.Odd(x) y = my.ops.Even(a) }":
        "node 'a': operator 'Odd' of domain 'my.ops' and 1 more",
    "(bool b, float[1] x) => (float[1] y) { y = If(b) <then_branch = t () => (p) "
    "{ p = my.ops.Odd(x) }, else_branch = e () => (q) { q = Neg(x) }> }": "node 'p': operator",
}  # fmt: skip


@pytest.mark.parametrize("graph", OPERATORS)
def test_custom_operators_are_told_from_known_ones(graph: str) -> None:
    if not OPERATORS[graph]:
        require_known_operators(model(graph), "m.onnx")
        return
    with pytest.raises(InconclusiveError, match=OPERATORS[graph]):
        require_known_operators(model(graph), "m.onnx")


def test_a_function_of_the_models_own_is_no_custom_operator() -> None:
    proto = model(CUSTOM)
    node = onnx.helper.make_node("Neg", ["a"], ["b"])
    proto.functions.append(onnx.helper.make_function(
        "my.ops", "Odd", ["a"], ["b"], [node], [onnx.helper.make_opsetid("", 21)]
    ))  # fmt: skip
    require_known_operators(proto, "m.onnx")
    proto.functions[0].node[0].domain = "their.ops"
    with pytest.raises(InconclusiveError, match=r"'their\.ops'"):
        require_known_operators(proto, "m.onnx")


# ---- memory ----


def test_weights_are_counted_in_float64() -> None:
    proto = model(GOOD)
    for name, dtype in (("a", np.float16), ("b", np.float32), ("c", np.int64)):
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros((3, 5), dtype), name))
    assert float64_bytes(proto) == 8 * (15 + 15)


def test_more_memory_than_there_is_is_refused_with_both_numbers() -> None:
    require_memory(10**9, file="m.onnx", available=10**9)
    with pytest.raises(InconclusiveError, match=r"m\.onnx: .* needs 7 GB .* 1\.5 GB are free; use"):
        require_memory(7 * 10**9, file="m.onnx", available=15 * 10**8)


def test_a_check_that_cannot_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighted = "(float[1, 4] x) => (float[1, 4] y) <float[4] w = {1, 2, 3, 4}> { y = Mul(x, w) }"
    paths = [saved(tmp_path, "a.onnx", weighted), saved(tmp_path, "b.onnx", GOOD)]
    monkeypatch.setattr(memory, "available_bytes", lambda: 31)
    with pytest.raises(InconclusiveError, match=r"a\.onnx: the check needs 3\.2e-08 GB"):
        bnfold.check(*paths)


def test_this_machine_has_memory_and_the_tightest_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = available_bytes()
    assert free is None or free > 10**6  # None: no system that tells
    group = tmp_path / "sub" / "own"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("3000\n")
    for folder in (group, group.parent):
        (folder / "memory.current").write_text("1500\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    (tmp_path / "cgroup").write_text("1:cpu:/\n0::/sub/own\n")
    rooms = list(memory._control_groups(tmp_path, tmp_path / "cgroup"))
    assert rooms == [None, 2000, None]
    monkeypatch.setattr(memory, "_machine", lambda: 10**5)
    monkeypatch.setattr(memory, "_control_groups", lambda *_: iter(rooms))
    monkeypatch.setattr(memory, "_process_limits", lambda: iter((None,)))
    assert available_bytes() == 2000


EXHAUSTED = [
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    InconclusiveError("ONNX Runtime can't run the model on CPU: Failed to allocate memory"),
    InconclusiveError("the oracle can't compute operator 'Conv': Unable to allocate 9 GiB"),
]


@pytest.mark.parametrize("error", EXHAUSTED, ids=lambda error: str(error)[:20])
def test_running_out_of_memory_is_inconclusive_and_says_so(error: Exception) -> None:
    said = r"m\.onnx: there is not enough memory.*fewer"
    with pytest.raises(InconclusiveError, match=said), memory_guard("m.onnx"):
        raise error


def test_a_cause_that_says_memory_is_heard_and_other_errors_pass() -> None:
    with pytest.raises(InconclusiveError, match="not enough memory"), memory_guard("m.onnx"):
        try:
            raise MemoryError
        except MemoryError as cause:
            raise InconclusiveError("an operator failed") from cause
    for error in (InvalidModelError("it is bad"), RuntimeError("a bug"), ValueError("a bug")):
        with pytest.raises(type(error), match=str(error)), memory_guard("m.onnx"):
            raise error
