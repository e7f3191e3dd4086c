"""Where a node ran is read from the runtime, and only shapes may be computed elsewhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from bnfold.errors import ProviderError
from bnfold.verify.ort_session import open_session
from bnfold.verify.placement import (
    Placed,
    count,
    is_shape_work,
    promised,
    read_profile,
    require_fact,
    require_promise,
)
from bnfold.verify.providers import CPU, CUDA
from bnfold.verify.subject import RunOptions

# A shape that is computed, a scale for each axis, and a step on data.
MODEL = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 3, 8, 8] x) => (float[n, k] y)
<int64[1] zero = {0}, int64[1] rest = {-1}, float[1] half = {0.5}> {
    s = Shape(x)
    sf = Cast <to = 1> (s)
    scaled = Mul(sf, half)
    si = Cast <to = 7> (scaled)
    b = Gather(s, zero)
    [join] t = Concat <axis = 0> (b, rest)
    u = Mul(x, half)
    y = Reshape(u, t)
}""")


def profiled(folder: Path, runs: int = 1) -> tuple[Placed, ...]:
    session = open_session(onnxruntime, MODEL, CPU, RunOptions(), folder / "p")
    for _ in range(runs):
        session.run(None, {"x": np.zeros((2, 3, 8, 8), np.float32)})
    return read_profile(Path(session.end_profiling()))


def test_a_real_profile_names_every_node_once(tmp_path: Path) -> None:
    nodes = profiled(tmp_path, runs=3)
    assert count(nodes) == {CPU: 8}
    assert Counter(n.op_type for n in nodes) == Counter(n.op_type for n in MODEL.graph.node)
    shape = next(node for node in nodes if node.op_type == "Shape")
    assert shape.inputs == (("float", (2, 3, 8, 8)),)
    assert shape.outputs == (("int64", (4,)),)
    assert "join (Concat)" in [str(node) for node in nodes]


def test_the_real_promise_names_every_node(tmp_path: Path) -> None:
    session = open_session(onnxruntime, MODEL, CPU, RunOptions(), tmp_path / "p")
    assert count(promised(session)) == {CPU: 8}
    assert "join (Concat)" in [str(node) for node in promised(session)]


def test_of_a_real_graph_only_the_shapes_are_shape_work(tmp_path: Path) -> None:
    nodes = profiled(tmp_path)
    data = [str(node) for node in nodes if not is_shape_work(node)]
    assert sorted(data) == ["Mul_6 (Mul)", "Reshape_7 (Reshape)"]


def test_an_older_runtime_promises_nothing() -> None:
    def refuse() -> None:
        raise RuntimeError("recording is off")

    assert promised(SimpleNamespace()) == ()
    assert promised(SimpleNamespace(get_provider_graph_assignment_info=refuse)) == ()


def placed(op: str, *tensors: tuple[str, tuple[int, ...]], on: str = CPU) -> Placed:
    return Placed(f"the_{op}", op, on, tensors[:-1], tensors[-1:])


@pytest.mark.parametrize(
    ("node", "allowed"),
    [
        (placed("Shape", ("float", (8, 3, 224, 224)), ("int64", (4,))), True),
        (placed("Gather", ("int64", (4,)), ("int64", ()), ("int64", ())), True),
        (placed("Mul", ("float", (4,)), ("float", (4,)), ("float", (4,))), True),
        (placed("Range", ("int64", ()), ("int64", ()), ("int64", ()), ("int64", (49,))), True),
        (placed("Equal", ("int64", (4,)), ("int64", (4,)), ("bool", (4,))), True),
        # a per-channel step, a table of indices, and operators that are no shape's
        (placed("Mul", ("float", (1, 8, 1, 1)), ("float", (1,)), ("float", (1, 8, 1, 1))), False),
        (placed("Add", ("float", (64,)), ("float", (64,)), ("float", (64,))), False),
        (placed("Gather", ("int64", (2048,)), ("int64", ()), ("int64", ())), False),
        (placed("Gather", ("float", (9, 64)), ("int64", (1,)), ("float", (1, 64))), False),
        (placed("Conv", ("float", (1,)), ("float", (1,)), ("float", (1,))), False),
        (placed("Relu", ("float", (1,)), ("float", (1,))), False),
        (placed("Identity", ("string", (1000,)), ("string", (1000,))), False),
        (Placed("s", "Shape", CPU), False),
    ],
    ids=str,
)
def test_shape_work_is_told_from_work_on_data(node: Placed, allowed: bool) -> None:
    assert is_shape_work(node) is allowed


ON = placed("Conv", ("float", (1, 8, 4, 4)), ("float", (1, 8, 4, 4)), on=CUDA)
SHAPE = placed("Shape", ("float", (1, 8, 4, 4)), ("int64", (4,)))
DATA = placed("Mul", ("float", (1, 8, 4, 4)), ("float", (1, 8, 4, 4)))


def test_a_shape_on_the_cpu_is_allowed_and_listed() -> None:
    assert require_fact([ON, SHAPE], CUDA) == ("the_Shape (Shape)",)
    assert require_fact([ON], CUDA) == ()
    assert require_fact([SHAPE, DATA], CPU) == ()


def test_data_on_the_cpu_is_an_error_that_names_the_node() -> None:
    with pytest.raises(ProviderError, match=r"1 of 3 nodes ran on CPUExec.*: the_Mul \(Mul\);"):
        require_fact([ON, SHAPE, DATA], CUDA)


def test_of_many_nodes_the_first_are_named() -> None:
    with pytest.raises(ProviderError, match=r"7 of 8 nodes .*\(Mul\) and 2 more; check on"):
        require_fact([ON, *[DATA] * 7], CUDA)


def test_a_run_of_shapes_alone_proves_nothing() -> None:
    with pytest.raises(ProviderError, match=r"no node ran on CUDAExec.*, 1 ran elsewhere"):
        require_fact([SHAPE], CUDA)
    with pytest.raises(ProviderError, match=r"no node ran on CUDAExec"):
        require_fact([], CUDA)


def test_a_promise_is_judged_by_the_operators_alone() -> None:
    require_promise([Placed("s", "Shape", CPU), Placed("m", "Mul", CPU)], CUDA)
    require_promise([Placed("c", "Conv", CPU)], CPU)
    assert require_fact([], CPU) == ()  # a model without nodes
    with pytest.raises(ProviderError, match=r"1 of 1 nodes would run on CPUExec.*: c \(Conv\)"):
        require_promise([Placed("c", "Conv", CPU)], CUDA)


def test_what_a_provider_compiled_counts_as_one_node_and_copies_as_none(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(
        """[{"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "CUDA-part_1_kernel_time",
         "args": {"op_name": "part_1", "node_index": "7", "provider": "CUDAExecutionProvider"}},
        {"cat": "Node", "name": "Memcpy_kernel_time",
         "args": {"op_name": "MemcpyToHost", "node_index": "8",
                  "provider": "CUDAExecutionProvider"}}]"""
    )
    (node,) = read_profile(file)
    assert require_fact([node], CUDA) == ()


@pytest.mark.parametrize("text", ["", "{}", "[{]", '[{"cat": "Node", "args": {"provider": 1}}]'])
def test_a_broken_profile_proves_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(ProviderError, match=r"no node ran|can't be read"):
        require_fact(read_profile(file), CUDA)
