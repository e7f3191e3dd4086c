"""The oracle's operators against torch in double, and its lifting of whole models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from bnfold.errors import InconclusiveError
from bnfold.verify.oracle import LiftedEvaluator, Oracle, spent_after

Array = NDArray[Any]
F64 = NDArray[np.float64]
DOUBLE = TensorProto.DOUBLE


def evaluate(
    op: str, arrays: list[Array], *, opset: int = 17, outputs: int = 1, **attributes: Any
) -> list[Array]:
    """What the oracle says of one node whose inputs are graph inputs."""
    names = [f"x{i}" for i in range(len(arrays))]
    made = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, made, name="the_node", **attributes)],
        "one_node",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), None)
            for n, a in zip(names, arrays, strict=True)
        ],
        [helper.make_tensor_value_info(n, DOUBLE, None) for n in made],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return list(Oracle(model).run(dict(zip(names, arrays, strict=True))).values())


def normal(*shape: int, seed: int = 0) -> F64:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def close(actual: Array, expected: Array | torch.Tensor) -> None:
    wanted = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    assert actual.shape == wanted.shape
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)


CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((2, 3, 11), (4, 3, 3), {}),
    "1d strided dilated": ((2, 3, 20), (4, 3, 3), {"strides": [2], "dilations": [3]}),
    "2d": ((2, 3, 8, 9), (4, 3, 3, 2), {}),
    "2d padded": ((2, 3, 8, 9), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    "2d asymmetric pads": ((1, 3, 8, 9), (4, 3, 3, 3), {"pads": [0, 2, 1, 3]}),
    "2d strided": ((2, 3, 9, 8), (4, 3, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
    "2d dilated": ((2, 3, 9, 9), (4, 3, 3, 3), {"dilations": [2, 3], "pads": [2, 3, 2, 3]}),
    "2d grouped": ((2, 6, 8, 8), (4, 3, 3, 3), {"group": 2}),
    "2d grouped strided": ((2, 6, 8, 8), (4, 3, 3, 3), {"group": 2, "strides": [2, 2]}),
    "2d depthwise": ((2, 5, 8, 8), (5, 1, 3, 3), {"group": 5, "pads": [1, 1, 1, 1]}),
    "2d depthwise strided": ((2, 5, 8, 8), (5, 1, 3, 3), {"group": 5, "strides": [2, 2]}),
    "2d depthwise, two each": ((2, 5, 8, 8), (10, 1, 3, 3), {"group": 5}),
    "2d one channel": ((2, 1, 8, 8), (4, 1, 3, 3), {}),
    "pointwise": ((2, 3, 8, 8), (4, 3, 1, 1), {}),
    "pointwise grouped": ((2, 6, 8, 8), (4, 3, 1, 1), {"group": 2}),
    "pointwise strided": ((2, 3, 8, 8), (4, 3, 1, 1), {"strides": [2, 2]}),
    "pointwise padded": ((2, 3, 8, 8), (4, 3, 1, 1), {"pads": [1, 0, 0, 2]}),
    "kernel as large as the input": ((2, 3, 5, 5), (4, 3, 5, 5), {}),
    "3d": ((1, 2, 5, 6, 7), (3, 2, 2, 3, 2), {"pads": [1, 0, 1, 0, 1, 2]}),
    "3d strided grouped": ((1, 4, 6, 6, 6), (2, 2, 3, 3, 3), {"group": 2, "strides": [2, 1, 2]}),
}  # fmt: skip


def torch_conv(x: F64, w: F64, b: F64 | None, attributes: dict[str, Any]) -> torch.Tensor:
    rank = x.ndim - 2
    pads = attributes.get("pads", [0] * 2 * rank)
    around = [p for axis in reversed(range(rank)) for p in (pads[axis], pads[axis + rank])]
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    result: torch.Tensor = conv(
        functional.pad(torch.from_numpy(x), around), torch.from_numpy(w),
        None if b is None else torch.from_numpy(b),
        stride=attributes.get("strides", [1] * rank),
        dilation=attributes.get("dilations", [1] * rank),
        groups=attributes.get("group", 1),
    )  # fmt: skip
    return result


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CONVS)
def test_conv_equals_torch_in_double(case: str, bias: bool) -> None:
    shape, kernel, attributes = CONVS[case]
    x, w = normal(*shape), normal(*kernel)
    b = normal(kernel[0]) if bias else None
    given = [x, w] if b is None else [x, w, b]
    (actual,) = evaluate("Conv", given, **attributes)
    close(actual, torch_conv(x, w, b, attributes))


def test_conv_is_the_same_however_small_its_blocks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in ("2d grouped", "2d strided", "2d depthwise", "3d"):
        shape, kernel, attributes = CONVS[case]
        monkeypatch.setattr("bnfold.verify.oracle_conv.BLOCK", 1)
        x, w = normal(*shape), normal(*kernel)
        close(evaluate("Conv", [x, w], **attributes)[0], torch_conv(x, w, None, attributes))


@pytest.mark.parametrize(
    ("auto_pad", "pads"),
    [("SAME_UPPER", [1, 0, 1, 1]), ("SAME_LOWER", [1, 1, 1, 0]), ("VALID", [0] * 4)],
)
def test_conv_pads_as_auto_pad_says(auto_pad: str, pads: list[int]) -> None:
    x, w = normal(1, 2, 7, 8), normal(3, 2, 3, 3)
    (actual,) = evaluate("Conv", [x, w], auto_pad=auto_pad, strides=[2, 2])
    close(actual, torch_conv(x, w, None, {"pads": pads, "strides": [2, 2]}))


TRANSPOSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((2, 3, 6), (3, 4, 3), {}),
    "2d strided": ((2, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 3]}),
    "2d padded": ((2, 3, 5, 6), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "2d output padding": (
        (2, 3, 5, 6), (3, 4, 3, 3),
        {"strides": [2, 3], "pads": [1, 1, 1, 1], "output_padding": [1, 2]},
    ),
    "2d dilated": ((2, 3, 5, 6), (3, 4, 2, 3), {"dilations": [2, 3]}),
    "2d grouped": ((2, 6, 5, 6), (6, 2, 3, 3), {"group": 3, "strides": [2, 2]}),
    "2d depthwise": ((2, 4, 5, 6), (4, 1, 2, 2), {"group": 4, "strides": [2, 2]}),
    "3d": ((1, 2, 3, 4, 3), (2, 3, 2, 2, 2), {"strides": [2, 1, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSPOSED)
def test_conv_transpose_equals_torch_in_double(case: str) -> None:
    shape, kernel, attributes = TRANSPOSED[case]
    rank = len(shape) - 2
    x, w, b = normal(*shape), normal(*kernel), normal(kernel[1] * attributes.get("group", 1))
    conv = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[
        rank - 1
    ]
    expected = conv(
        torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(b),
        stride=attributes.get("strides", [1] * rank),
        padding=attributes.get("pads", [0] * 2 * rank)[:rank],
        output_padding=attributes.get("output_padding", [0] * rank),
        dilation=attributes.get("dilations", [1] * rank), groups=attributes.get("group", 1),
    )  # fmt: skip
    close(evaluate("ConvTranspose", [x, w, b], **attributes)[0], expected)


@pytest.mark.parametrize(
    ("attributes", "pads"),
    [
        # stride 2 on 5x6 with a 3x3 kernel makes 11x13; one row and column too many go.
        ({"auto_pad": "SAME_UPPER"}, ((0, 1), (0, 1))),
        ({"auto_pad": "SAME_LOWER"}, ((1, 0), (1, 0))),
        ({"output_shape": [10, 12]}, ((1, 0), (1, 0))),
        ({"output_shape": [10, 12], "auto_pad": "SAME_UPPER"}, ((0, 1), (0, 1))),
        ({"pads": [1, 0, 2, 1]}, ((1, 2), (0, 1))),
        ({"auto_pad": "VALID"}, ((0, 0), (0, 0))),
    ],
)
def test_conv_transpose_crops_as_it_is_told(attributes: dict[str, Any], pads: Any) -> None:
    x, w = normal(1, 2, 5, 6), normal(2, 3, 3, 3)
    full = functional.conv_transpose2d(torch.from_numpy(x), torch.from_numpy(w), stride=2).numpy()
    (top, bottom), (left, right) = pads
    expected = full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right]
    close(evaluate("ConvTranspose", [x, w], strides=[2, 2], **attributes)[0], expected)


POOLS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_shape": [2, 3]},
    "strided": {"kernel_shape": [3, 3], "strides": [2, 2]},
    "padded": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "ceil": {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
    "ceil padded": {
        "kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1,
    },
    "ceil, stride above the kernel": {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", POOLS)
def test_max_pool_equals_torch(case: str) -> None:
    x = normal(2, 3, 10, 11) - 5  # all negative, so that a zero pad would win
    a = POOLS[case]
    expected = functional.max_pool2d(
        torch.from_numpy(x), a["kernel_shape"], a.get("strides", [1, 1]),
        a.get("pads", [0, 0])[:2], ceil_mode=bool(a.get("ceil_mode")),
    )  # fmt: skip
    close(evaluate("MaxPool", [x], **a)[0], expected)


def test_max_pool_is_dilated_over_any_rank() -> None:
    x = normal(2, 3, 12, 5, 6)
    attributes: dict[str, Any] = {
        "kernel_shape": [3, 2, 2],
        "dilations": [2, 1, 3],
        "strides": [1, 2, 1],
    }
    expected = functional.max_pool3d(torch.from_numpy(x), [3, 2, 2], [1, 2, 1], 0, [2, 1, 3])
    close(evaluate("MaxPool", [x], **attributes)[0], expected)


def test_max_pool_gives_its_indices() -> None:
    x = normal(1, 2, 6, 6)
    y, indices = evaluate("MaxPool", [x], outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    np.testing.assert_array_equal(x.ravel()[indices], y)


def test_max_pool_takes_integers() -> None:
    x = np.arange(-8, 8, dtype=np.int8).reshape(1, 1, 4, 4)
    (y,) = evaluate("MaxPool", [x], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    assert y.dtype == np.int8
    np.testing.assert_array_equal(y, [[[[-3, -1], [5, 7]]]])


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("case", POOLS)
def test_average_pool_equals_torch(case: str, include: int) -> None:
    x = normal(2, 3, 10, 11) + 3
    a = POOLS[case]
    expected = functional.avg_pool2d(
        torch.from_numpy(x), a["kernel_shape"], a.get("strides", [1, 1]),
        a.get("pads", [0, 0])[:2], ceil_mode=bool(a.get("ceil_mode")),
        count_include_pad=bool(include),
    )  # fmt: skip
    close(evaluate("AveragePool", [x], count_include_pad=include, opset=19, **a)[0], expected)


def test_average_pool_dilated_with_asymmetric_pads_is_the_mean_of_what_it_sees() -> None:
    x = normal(1, 1, 7)
    attributes: dict[str, Any] = {
        "kernel_shape": [3],
        "dilations": [2],
        "pads": [1, 2],
        "strides": [2],
    }
    (y,) = evaluate("AveragePool", [x], opset=19, **attributes)
    seen = [[i for i in range(start, start + 5, 2) if 0 <= i < 7] for start in (-1, 1, 3)]
    close(y, np.array([[[x[0, 0, places].mean() for places in seen]]]))


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_global_average_pool_is_the_mean_over_space(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    close(
        evaluate("GlobalAveragePool", [x])[0], x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)
    )


def statistics(channels: int) -> list[F64]:
    gamma, beta, mean = (normal(channels, seed=s) for s in (1, 2, 3))
    gamma[:2] = [-0.5, 0.0]
    return [gamma, beta, mean, np.abs(normal(channels, seed=4)) + 1e-6]


@pytest.mark.parametrize("opset", [7, 9, 14, 15, 17])
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3), (2, 5, 3, 4), (1, 5, 2, 3, 2)])
def test_batch_normalization_infers_with_its_running_statistics(
    opset: int, shape: tuple[int, ...]
) -> None:
    x, (gamma, beta, mean, var) = normal(*shape), statistics(5)
    (actual,) = evaluate(
        "BatchNormalization", [x, gamma, beta, mean, var], opset=opset, epsilon=0.01
    )
    t_x, t_mean, t_var, t_gamma, t_beta = map(torch.from_numpy, (x, mean, var, gamma, beta))
    eps = float(np.float32(0.01))  # the attribute is a float32
    expected = functional.batch_norm(t_x, t_mean, t_var, t_gamma, t_beta, eps=eps)
    close(actual, expected)


def test_batch_normalization_in_training_mode_uses_the_batch() -> None:
    x, (gamma, beta, mean, var) = normal(4, 5, 3), statistics(5)
    y, new_mean, new_var = evaluate(
        "BatchNormalization", [x, gamma, beta, mean, var], outputs=3, training_mode=1, momentum=0.75
    )
    expected = functional.batch_norm(
        torch.from_numpy(x), None, None, torch.from_numpy(gamma), torch.from_numpy(beta),
        training=True, eps=float(np.float32(1e-5)),
    )  # fmt: skip
    close(y, expected)
    close(new_mean, 0.75 * mean + 0.25 * x.mean(axis=(0, 2)))
    close(new_var, 0.75 * var + 0.25 * x.var(axis=(0, 2)))


def test_old_batch_normalization_may_have_statistics_for_each_place() -> None:
    x = normal(2, 3, 4)
    gamma, beta, mean = (normal(3, 4, seed=s) for s in range(3))
    var = np.abs(normal(3, 4, seed=3)) + 0.1
    (y,) = evaluate(
        "BatchNormalization", [x, gamma, beta, mean, var], opset=8, spatial=0, epsilon=0.0
    )
    close(y, (x - mean) / np.sqrt(var) * gamma + beta)


@pytest.mark.parametrize(
    ("pads", "expected"),
    [
        ([1, 0, 0, 2], [[0, 0, 0, 0, 0], [1, 2, 3, 0, 0], [4, 5, 6, 0, 0]]),
        ([0, -1, 0, 0], [[2, 3], [5, 6]]),
        ([-1, 1, 1, -1], [[0, 4, 5], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("opset", [2, 13, 18])
def test_pad_adds_and_crops_in_every_version(opset: int, pads: list[int], expected: Any) -> None:
    x = np.array([[1.0, 2, 3], [4, 5, 6]])
    if opset == 2:
        (y,) = evaluate("Pad", [x], opset=2, pads=pads)
    else:
        (y,) = evaluate("Pad", [x, np.array(pads)], opset=opset)
    close(y, np.array(expected, dtype=np.float64))


def test_pad_takes_a_value_and_axes() -> None:
    x = normal(2, 3)
    value, axes = np.array(7.0), np.array([-1])
    (y,) = evaluate("Pad", [x, np.array([1, 2]), value, axes], opset=18)
    close(y, np.pad(x, ((0, 0), (1, 2)), constant_values=7.0))


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_pad_mirrors_and_repeats(mode: Any) -> None:
    x = normal(2, 5)
    (y,) = evaluate("Pad", [x, np.array([0, 2, 0, -1])], mode=mode)
    close(y, np.pad(x[:, :-1], ((0, 0), (2, 0)), mode=mode))


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c_shape", [None, (), (5,), (1, 5), (3, 1), (3, 5)])
def test_gemm_takes_both_layouts_and_every_bias(
    trans_a: int, trans_b: int, c_shape: tuple[int, ...] | None
) -> None:
    a, b = normal(3, 4), normal(4, 5)
    given = [a.T.copy() if trans_a else a, b.T.copy() if trans_b else b]
    c = None if c_shape is None else np.asarray(normal(*c_shape))
    given += [] if c is None else [c]
    (y,) = evaluate("Gemm", given, transA=trans_a, transB=trans_b, alpha=0.5, beta=2.0)
    close(y, 0.5 * a @ b + (0 if c is None else 2.0 * c))


def test_erf_has_the_precision_of_a_double() -> None:
    x = np.linspace(-3, 3, 101)
    close(evaluate("Erf", [x])[0], np.array([math.erf(v) for v in x]))


def test_a_cast_between_floats_rounds_nothing() -> None:
    x = np.array([1 + 2.0**-40, 70000.0, 1e-30])
    for to in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, DOUBLE):
        close(evaluate("Cast", [x], to=to)[0], x)


def test_a_cast_to_integers_and_back_is_done() -> None:
    (whole,) = evaluate("Cast", [np.array([1.9, -1.9, 0.0])], to=TensorProto.INT64)
    assert whole.dtype == np.int64
    np.testing.assert_array_equal(whole, [1, -1, 0])
    (flags,) = evaluate("Cast", [np.array([1.9, -1.9, 0.0])], to=TensorProto.BOOL)
    np.testing.assert_array_equal(flags, [True, True, False])
    close(evaluate("Cast", [np.array([3, 4])], to=TensorProto.FLOAT16)[0], np.array([3.0, 4.0]))


THIRD = float(np.float32(1 / 3))

HEAD = "agraph (float[3] x) => (float[3] y)"

LIFTED = {
    "value_float": HEAD + "{ c = Constant <value_float = 0.333333343>() y = Div(x, c) }",
    "value_floats": HEAD + "{ c = Constant <value_floats = [0.333333343]>() y = Div(x, c) }",
    "value": HEAD + "{ c = Constant <value = float {0.333333343}>() y = Div(x, c) }",
    "initializer": HEAD + "<float c = {0.333333343}> { y = Div(x, c) }",
    "cast in between": HEAD + """<float c = {0.333333343}> {
        h = Cast <to = 10> (x) d = Cast <to = 10> (c) q = Div(h, d) y = Cast <to = 1> (q) }""",
    "constant of shape": HEAD + """<int64[1] s = {1}> {
        c = ConstantOfShape <value = float[1] {0.333333343}> (s) y = Div(x, c) }""",
    "subgraph": HEAD + """<bool b = {1}> {
        y = If (b) <
          then_branch = then_graph () => (float[3] a) {
            c = Constant <value_float = 0.333333343>() a = Div(x, c) },
          else_branch = else_graph () => (float[3] e) { e = Identity(x) }
        > }""",
    "cast like": HEAD + """<float16 k = {14592}, float c = {0.333333343}> {
        h = CastLike(x, k) d = CastLike(c, k) q = Div(h, d) y = CastLike(q, x) }""",
}  # fmt: skip


def parsed(graph: str, *, opset: int = 17, domain: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{domain}]> {graph}')


@pytest.mark.parametrize("case", LIFTED)
def test_every_constant_and_every_step_is_in_double(case: str) -> None:
    x = np.array([1.0, 2.0, 1e6], dtype=np.float32)
    model = parsed(LIFTED[case])
    before = model.SerializeToString(deterministic=True)
    (y,) = Oracle(model).run({"x": x}).values()
    close(y, x.astype(np.float64) / THIRD)
    assert model.SerializeToString(deterministic=True) == before


def test_functions_are_lifted_and_run_our_operators() -> None:
    model = parsed(
        """agraph (float[3] x) => (float[3] y) { y = local.f <c = 0.333333343>(x) }
        <domain: "local", opset_import: ["" : 17]>
        f <c>(v) => (w) { k = Constant <value_float : float = @c>() e = Erf(v) w = Div(e, k) }""",
        domain=', "local" : 1',
    )
    x = np.array([0.1, 0.5, 2.0], dtype=np.float32)
    (y,) = Oracle(model).run({"x": x}).values()
    close(y, np.array([math.erf(v) for v in x.astype(np.float64)]) / THIRD)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_models_are_lifted(dtype: str) -> None:
    model = parsed(f"agraph ({dtype}[2] x) => ({dtype}[2] y) {{ y = Mul(x, c) }}")
    data_type = TensorProto.DataType.Value(dtype.upper())
    np_dtype = helper.tensor_dtype_to_np_dtype(data_type)
    c = np.array([0.1, 300.0]).astype(np_dtype)
    model.graph.initializer.append(numpy_helper.from_array(c, "c"))
    x = np.array([0.3, 300.0]).astype(np_dtype)
    (y,) = Oracle(model).run({"x": x}).values()
    close(y, x.astype(np.float64) * c.astype(np.float64))  # 90000 is no float16


def test_a_loop_keeps_what_its_body_reads_from_outside() -> None:
    model = parsed(
        """agraph (float[2] x) => (float[2] y) <int64 n = {3}, bool go = {1}> {
        k = Add(x, x)
        y = Loop (n, go, x) < body = b (int64 i, bool c, float[2] v) => (bool c2, float[2] w)
            { c2 = Identity(c) w = Add(v, k) } > }"""
    )
    (y,) = Oracle(model).run({"x": np.array([1.0, 2.0], np.float32)}).values()
    close(y, np.array([7.0, 14.0]))


def test_values_are_let_go_after_their_last_use() -> None:
    model = parsed(
        """agraph (float[2] x) => (float[2] y) { a = Relu(x) b = Neg(a) c = Add(a, b)
        y = Add(c, x) unused = Abs(y) }"""
    )
    spent = [sorted(names) for names in spent_after(model.graph.node, ["y"])]
    assert spent == [[], [], ["a", "b"], ["c", "x"], ["unused"]]
    # An output that is also read later is kept.
    assert LiftedEvaluator(model).run(["y"], {"x": np.ones(2)})[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("graph", "domain", "said"),
    [
        ("agraph (float[2] x) => (float[2] y) { [odd] y = custom.Twist(x) }", ', "custom" : 1',
         "node 'odd': the float64 oracle has no operator 'custom.Twist'"),
        ("agraph (float[2] x) => (float[2] y) { [dice] y = RandomNormalLike(x) }", "",
         "node 'dice': operator 'RandomNormalLike' draws random numbers"),
        ("agraph (float[2] x) => (float[N] y) <int64[1] s = {3}> { [cut] y = Reshape(x, s) }", "",
         "node 'cut': the float64 oracle can't compute operator 'Reshape'"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_inconclusive_and_named(
    graph: str, domain: str, said: str
) -> None:
    with pytest.raises(InconclusiveError) as caught:
        Oracle(parsed(graph, domain=domain)).run({"x": np.ones(2, np.float32)})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


LOOP = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2,3] x, int64 n, bool go) => (float[2,3] y, float[k,2,3] s) {{
  y, s = Loop ({trips}, {going}, x) < body =
    b (int64 i, bool c, float[2,3] v) => (bool d, float[2,3] w, float[2,3] z) {{
    limit = Constant <value_int = 2> ()
    d = Less(i, limit)
    w = Add(v, x)
    z = Mul(v, v) }} > }}"""


@pytest.mark.parametrize(("trips", "going"), [("n", "go"), ("n", ""), ("", "go"), ("", "")])
def test_a_loop_runs_as_often_as_the_runtime_says(trips: str, going: str) -> None:
    model = onnx.parser.parse_model(LOOP.format(trips=trips, going=going))
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for count in (1, 2, 5):
        feeds = {"x": x, "n": np.array(count), "go": np.array(True)}
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        wanted = session.run(None, taken)
        found = Oracle(model).run(feeds)
        for one, other in zip(found.values(), wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
