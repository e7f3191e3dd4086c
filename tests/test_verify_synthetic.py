"""Drawn inputs: seeded, valid, distinct; they follow the running statistics; sizes come in two."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from bnfold.errors import UsageError
from bnfold.verify.onnx_inputs import drawn_for, input_specs
from bnfold.verify.oracle import Oracle
from bnfold.verify.sizes import sized
from bnfold.verify.statistics import FirstLayer, fit, nonnegative, smoothed
from bnfold.verify.subject import TensorSpec
from bnfold.verify.synthetic import LARGE_IN_HALF, Limit, synthetic


def model(inputs: str, body: str = "y = Identity(x)", **weights: NDArray[Any]) -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (y) {{ {body} }}'
    made = onnx.parser.parse_model(text)
    made.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in weights.items())
    return made


IMAGE = model("float[N, 3, H, W] x")


# ---- seeds, sizes, types ----


def test_the_same_seed_gives_the_same_samples_and_another_gives_others() -> None:
    one, again, other = drawn_for(IMAGE, 8, 5), drawn_for(IMAGE, 8, 5), drawn_for(IMAGE, 8, 6)
    assert (one.seed, len(one.feeds), one.distinct) == (5, 8, 8)
    for a, b, c in zip(one.feeds, again.feeds, other.feeds, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
        assert not np.array_equal(a["x"], c["x"])


def test_more_samples_keep_the_first_ones() -> None:
    few, many = drawn_for(IMAGE, 2), drawn_for(IMAGE, 4)
    np.testing.assert_array_equal(few.feeds[1]["x"], many.feeds[1]["x"])


@pytest.mark.parametrize(
    ("inputs", "first", "second", "dtype"),
    [
        ("float[1, 3, 20, 30] x", (1, 3, 20, 30), (1, 3, 20, 30), np.float32),
        ("float[N, 3, H, W] x", (1, 3, 64, 64), (2, 3, 96, 96), np.float32),
        ("double[N, 3, D, H, W] x", (1, 3, 32, 32, 32), (2, 3, 48, 48, 48), np.float64),
        ("float16[N, 7] x", (1, 7), (2, 7), np.float16),
        ("bfloat16[4, 7] x", (4, 7), (4, 7), ml_dtypes.bfloat16),
        ("float8e4m3fn[4, 7] x", (4, 7), (4, 7), ml_dtypes.float8_e4m3fn),
        ("int4[4, 7] x", (4, 7), (4, 7), ml_dtypes.int4),
        ("float[N, 40, T] x", (1, 40, 32), (2, 40, 48), np.float32),
        ("int64[N, T] x", (1, 16), (2, 24), np.int64),
        ("bool[N, T] x", (1, 16), (2, 24), np.bool_),
        ("float[?, 3] x", (1, 3), (2, 3), np.float32),
        ("float x", (), (), np.float32),
    ],
)
def test_open_sizes_are_small_and_come_in_two(
    inputs: str, first: tuple[int, ...], second: tuple[int, ...], dtype: Any
) -> None:
    drawn = drawn_for(model(inputs), 4)
    assert [feed["x"].shape for feed in drawn.feeds] == [first, first, second, second]
    assert {feed["x"].dtype for feed in drawn.feeds} == {np.dtype(dtype)}
    assert drawn.has_second_sizes is (first != second)
    assert drawn.uses()[0].shapes == tuple(dict.fromkeys((first, second)))
    alone = drawn.without_second_sizes()
    assert {feed["x"].shape for feed in alone.feeds} == {first}
    assert (alone.has_second_sizes, len(alone.feeds), alone.seed) == (False, 4, 0)
    np.testing.assert_array_equal(alone.feeds[0]["x"], drawn.feeds[0]["x"])


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def test_a_symbol_has_one_size_wherever_it_stands_and_expressions_are_evaluated() -> None:
    specs = [spec("x", 1, "T", 8, 8), spec("z", "T", "2*T + 1"), spec("w", 3, "T // 2", "?")]
    for second, t in ((False, 64), (True, 96)):
        shapes = sized(specs, second=second)
        assert shapes["x"][1] == shapes["z"][0] == t
        assert shapes["z"][1] == 2 * t + 1
        assert shapes["w"][1] == t // 2
    assert sized(specs, {"T": (7, 9)}, second=True)["z"] == (9, 19)


def test_fewer_than_four_samples_have_one_size() -> None:
    assert [drawn_for(IMAGE, n).has_second_sizes for n in (1, 2, 3, 4)] == [False] * 3 + [True]


HEAD = np.zeros((3 * 28 * 28, 5), np.float32)
SIZES = {
    "any": ("y = Relu(x)", (64, 96), (1, 2)),
    "a flattened image": ("f = Flatten(x) y = MatMul(f, head)", (28, 28), (1, 2)),
    "positions of a fixed number": ("y = Add(x, positions)", (32, 32), (1, 2)),
    "a frozen batch": ("f = Reshape(x, flat) y = Concat<axis = 1>(f, one)", (64, 96), (1, 1)),
    "what inference cannot follow": ("y = my.ops.Odd(x)", (64, 96), (1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("what", SIZES)
def test_sizes_are_those_that_the_graph_can_take(what: str) -> None:
    body, sides, batches = SIZES[what]
    proto = model(
        "float[N, 3, S, S] x", body, head=HEAD, positions=np.zeros((32, 32), np.float32),
        flat=np.array([0, -1]), one=np.zeros((1, 1), np.float32),
    )  # fmt: skip
    proto.opset_import.add(domain="my.ops", version=1)
    drawn = drawn_for(proto, 4)
    shapes = [(b, 3, s, s) for b, s in zip(batches, sides, strict=True)]
    assert [feed["x"].shape for feed in drawn.feeds] == [shapes[0]] * 2 + [shapes[1]] * 2


# ---- extremes ----


@pytest.mark.parametrize(
    ("samples", "last"),
    [(1, ()), (2, ()), (3, ("large",)), (6, ("large", "tiny")), (8, ("large", "tiny", "even"))],
)
def test_ordinary_samples_come_first_then_extremes(samples: int, last: tuple[str, ...]) -> None:
    drawn = drawn_for(model("float[1, 3, 9, 9] x"), samples)
    assert drawn.roles == ("ordinary",) * (samples - len(last)) + last
    size = {role: np.abs(f["x"]).max() for role, f in zip(drawn.roles, drawn.feeds, strict=True)}
    assert 1 < size["ordinary"] < 6
    if "large" in last:
        assert size["large"] > 12
    if "tiny" in last:
        assert size["tiny"] < 6e-3
    if "even" in last:
        x = drawn.feeds[-1]["x"]
        assert (x == x[:, :, :1, :1]).all()
        assert len(np.unique(x)) == 3
    assert set(drawn.without_extremes().roles) == {"ordinary"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu])
def test_large_samples_stay_in_the_range_of_a_narrow_type(dtype: Any) -> None:
    for feed in synthetic([spec("x", 4, 5, dtype=dtype)], 8, large=1e9).feeds:
        assert np.isfinite(feed["x"].astype(np.float32)).all()


def test_large_samples_are_smaller_where_the_model_is_half_precise() -> None:
    narrow = model("float[1, 400] x", w=np.ones(3, np.float16))
    peaks = [float(np.abs(drawn_for(m, 8).feeds[5]["x"]).max())
             for m in (model("float[1, 400] x"), narrow)]  # fmt: skip
    assert peaks[1] == pytest.approx(peaks[0] * LARGE_IN_HALF / 8)


def test_no_even_image_goes_through_an_instance_norm() -> None:
    one = np.ones(3, np.float32)
    proto = model("float[1, 3, 8, 8] x", "y = InstanceNormalization(x, s, s)", s=one)
    assert drawn_for(proto, 8).roles[-3:] == ("ordinary", "large", "tiny")


# ---- integers ----

TABLE = np.ones((5, 2), np.float32)
LOOKUPS = {
    "straight": "y = Gather(t, x)",
    "along another axis": "y = Gather<axis = 1>(sideways, x)",
    "after a cast": "i = Cast<to = 6>(x) y = Gather(t, i)",
    "after a move": "k = Constant<value_ints = [-1]>() i = Reshape(x, k) y = Gather(t, i)",
    "in a table behind an Identity": "u = Identity(t) y = Gather(u, x)",
    "in the smaller of two": "a = Gather(b, x) y = Gather(t, x)",
    "as one of many classes":
        "d = Constant<value_int = 5>() v = Constant<value_floats = [0.0, 1.0]>() "
        "y = OneHot(x, d, v)",
    "in a branch":
        "c = Constant<value = bool {1}>() y = If(c) <"
        "then_branch = m () => (p) { p = Gather(t, x) },"
        " else_branch = n () => (q) { q = Gather(t, x) }>",
}  # fmt: skip


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_integers_are_valid_where_they_are_looked_up(lookup: str) -> None:
    tables = {"t": TABLE, "sideways": TABLE.T.copy(), "b": np.ones((9, 1), np.float32)}
    proto = model("int64[N, T] x", LOOKUPS[lookup], **tables)
    drawn = drawn_for(proto, 20)
    values = np.concatenate([feed["x"].ravel() for feed in drawn.feeds])
    assert sorted(set(values.tolist())) == [0, 1, 2, 3, 4]
    assert drawn.kinds == {"x": "integers"}


def test_a_mask_is_of_bits_and_never_hides_everything() -> None:
    for dtype in ("int64", "bool"):
        drawn = drawn_for(model(f"{dtype}[4, 3] x"), 40)
        values = np.concatenate([feed["x"] for feed in drawn.feeds])
        assert set(values.ravel().tolist()) == {0, 1}
        assert (values.sum(axis=-1) > 0).all()
        assert drawn.kinds == {"x": "bits"}


@pytest.mark.parametrize(
    ("inputs", "body", "low", "high"),
    [
        ("uint8[1, 3, 64, 64] x", "y = Identity(x)", 0, 255),
        ("int32[1, 3, 64, 64] x", "f = Cast<to = 1>(x) g = Div(f, k) y = Conv(g, w)", 0, 255),
        ("int8[1, 64, 64] x", "y = DequantizeLinear(x, k)", -128, 127),
    ],
)
def test_pixels_use_the_whole_range(inputs: str, body: str, low: int, high: int) -> None:
    weights = {"k": np.float32(255), "w": np.ones((1, 3, 1, 1), np.float32)}
    x = drawn_for(model(inputs, body, **{n: np.asarray(w) for n, w in weights.items()}), 1)
    values = x.feeds[0]["x"].astype(np.int64)
    assert low <= values.min() < low + 5
    assert high - 5 < values.max() <= high


@pytest.mark.parametrize(
    "body",
    ["r = Identity(x) y = Less(n, r)", "y, h = GRU<hidden_size = 2>(s, w, r, , n)"],
)
def test_a_length_counts_the_axis_that_is_open(body: str) -> None:
    proto = model("float[N, 7, T] x, int32[N] n", body)
    drawn = drawn_for(proto, 40)
    assert drawn.kinds["n"] == "integers"
    for feed in drawn.feeds:
        assert 1 <= feed["n"].min() <= feed["n"].max() <= feed["x"].shape[2]
    assert max(int(feed["n"].max()) for feed in drawn.feeds) > 7


def test_boxes_have_their_corners_in_order() -> None:
    proto = model(
        "float[1, 3, 32, 32] x, float[9, 4] b, int64[9] i",
        "y = RoiAlign<spatial_scale = 0.25>(x, b, i)",
    )
    drawn = drawn_for(proto, 4)
    assert (drawn.kinds["b"], drawn.kinds["x"]) == ("boxes", "normal")
    for feed in drawn.feeds:
        assert (feed["b"][:, :2] < feed["b"][:, 2:]).all()
        assert feed["b"].max() <= 32
        assert not feed["i"].any()


def test_several_inputs_of_every_type_are_drawn_each_in_its_way() -> None:
    types = ["float", "double", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8",
             "uint16", "uint32", "uint64", "bool", "complex64"]  # fmt: skip
    proto = model(", ".join(f"{t}[N, 6] x{i}" for i, t in enumerate(types)), "y = Identity(x0)")
    drawn = drawn_for(proto, 8)
    assert drawn.distinct == 8
    for made, wanted in zip(drawn.uses(), input_specs(proto), strict=True):
        assert (made.name, made.dtype) == (wanted.name, str(wanted.dtype))
        assert made.kind == ("normal" if "float" in made.dtype or "complex" in made.dtype
                             else "bits")  # fmt: skip


def test_limits_hold_without_a_graph() -> None:
    limits = {"i": Limit(2, 4), "n": Limit(counts=("x", 1))}
    specs = [spec("x", 1, 9), spec("i", 30, dtype=np.int64), spec("n", 5, dtype=np.int64)]
    feed = synthetic(specs, 1, limits=limits).feeds[0]
    assert set(feed["i"].tolist()) == {2, 3}
    assert 1 <= feed["n"].min() <= feed["n"].max() <= 9


def test_initializers_that_are_inputs_are_not_fed() -> None:
    proto = model("float[1] x, float[2] w", w=np.ones(2, np.float32))
    assert set(drawn_for(proto, 1).feeds[0]) == {"x"}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("seq(float[2]) x", "node 'x'.*is no tensor but a sequence"),
        ("float x, float[] z", None),
        ("string[2] x", "node 'x'.*no synthetic input can be drawn for type string"),
    ],
)
def test_an_input_that_cannot_be_drawn_is_named(inputs: str, said: str | None) -> None:
    proto = model(inputs)
    if said is None:
        proto.graph.input[1].type.tensor_type.ClearField("shape")
        said = "node 'z'.*is no tensor of known rank"
    with pytest.raises(UsageError, match=said):
        drawn_for(proto)


# ---- running statistics ----

RNG = np.random.default_rng(3)
WEIGHT, BIAS = RNG.normal(0, 0.4, (12, 3, 3, 3)), RNG.normal(0, 1, 12)


def seen(spread: float = 2.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Running statistics of the Conv on smooth images whose channels have means of their own."""
    images = smoothed(RNG.standard_normal((40, 3, 24, 24)), (2, 3)) * spread
    images += 0.5 * RNG.standard_normal(images.shape)
    images += np.array([1.0, -2.0, 3.0])[:, None, None]
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3))
    y = np.einsum("ncijkl,ockl->noij", windows, WEIGHT, optimize=True)
    return y.mean(axis=(0, 2, 3)), y.var(axis=(0, 2, 3))


MEAN, VARIANCE = seen()
WAYS = {
    "straight": "c = Conv(x, w)",
    "with a bias": "c = Conv(x, w, b)",
    "with a bias behind": "d = Conv(x, w) c = Add(d, b4)",
    "normalised": "e = Sub(x, m) f = Div(e, s) c = Conv(f, w)",
    "normalised by one number": "e = Mul(x, k) f = Sub(k, e) c = Conv(f, w)",
    "channels last": "e = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv(e, w)",
    "padded": "p = Pad(x, z) c = Conv(p, w)",
    "as a constant behind an Identity": "v = Identity(w) c = Conv(x, v)",
}


def net(way: str, mean: NDArray[Any], variance: NDArray[Any]) -> onnx.ModelProto:
    shape = "N, H, W, 3" if way == "channels last" else "N, 3, H, W"
    constants = {
        "w": WEIGHT, "b": BIAS, "m": RNG.normal(0, 1, (3, 1, 1)),
        "s": np.array([0.2, 3.0, 1.0]).reshape(1, 3, 1, 1), "k": np.array(0.5),
        "z": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "g": np.ones(12), "var": variance,
        "mean": mean + BIAS if "bias" in way else mean, "b4": BIAS.reshape(1, 12, 1, 1),
    }  # fmt: skip
    wide = {n: c if c.dtype.kind == "i" else c.astype(np.float32) for n, c in constants.items()}
    body = f"{WAYS[way]} y = BatchNormalization(c, g, g, mean, var)"
    return model(f"float[{shape}] x", body, **wide)


def off(proto: onnx.ModelProto, samples: int = 16) -> tuple[float, float]:
    """How far the activations ``c`` are from the running statistics: means, and log variances."""
    drawn = drawn_for(proto, samples).without_second_sizes().without_extremes()
    inner = onnx.ModelProto()
    inner.CopyFrom(proto)
    inner.graph.output[0].name = "c"
    oracle = Oracle(inner)
    y = np.concatenate([oracle.run(feed)["c"] for feed in drawn.feeds])
    fetched = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    deviation = np.sqrt(fetched["var"])
    means = abs(y.mean(axis=(0, 2, 3)) - fetched["mean"]) / deviation
    return float(np.median(means)), float(
        np.median(abs(np.log(y.var(axis=(0, 2, 3)) / fetched["var"])))
    )


@pytest.mark.parametrize("way", WAYS)
def test_inputs_give_the_first_batchnorm_what_it_has_seen(way: str) -> None:
    proto = net(way, MEAN, VARIANCE)
    drawn = drawn_for(proto, 2)
    assert drawn.kinds == {"x": "running statistics"}
    mean, variance = off(proto)
    assert mean < 0.2
    assert variance < np.log(1.3)


def test_standard_normal_inputs_would_not_pass_for_what_was_seen() -> None:
    fresh = net("straight", np.zeros(12), np.ones(12))  # nothing to learn: standard normal
    assert drawn_for(fresh, 2).kinds == {"x": "normal"}
    oracle_inputs = drawn_for(fresh, 8).feeds[0]["x"]
    windows = np.lib.stride_tricks.sliding_window_view(oracle_inputs, (3, 3), axis=(2, 3))
    y = np.einsum("ncijkl,ockl->noij", windows, WEIGHT, optimize=True)
    assert np.median(abs(np.log(y.var(axis=(0, 2, 3)) / VARIANCE))) > np.log(1.5)
    assert np.median(abs(y.mean(axis=(0, 2, 3)) - MEAN) / np.sqrt(VARIANCE)) > 0.5


def test_the_trained_nets_inputs_give_its_batchnorms_what_they_have_seen() -> None:
    proto = onnx.load("models/digits_resnet.onnx")
    norms = [node for node in proto.graph.node if node.op_type == "BatchNormalization"][:4]
    known = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    drawn = drawn_for(proto, 16).without_extremes()
    assert drawn.kinds == {"image": "running statistics"}
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=node.input[0]) for node in norms)

    def variance_off(feeds: Any) -> list[float]:
        outputs = [Oracle(proto).run(feed) for feed in feeds]
        found = []
        for node in norms:
            y = np.concatenate([o[node.input[0]].transpose(0, 2, 3, 1).reshape(-1, len(
                known[node.input[4]])) for o in outputs])  # fmt: skip
            found.append(float(np.median(abs(np.log(y.var(axis=0) / known[node.input[4]])))))
        return found

    assert max(variance_off(drawn.feeds)) < np.log(1.6)
    shape = drawn.feeds[0]["image"].shape
    normal = [{"image": RNG.standard_normal(shape).astype(np.float32)} for _ in range(16)]
    assert min(variance_off(normal)) > np.log(3)


def test_a_batchnorm_right_at_the_input_is_followed() -> None:
    mean, var = np.array([5, -5, 0], np.float32), np.array([4, 0.25, 9], np.float32)
    one = np.ones(3, np.float32)
    proto = model("float[N, 3, 8, 8] x", "y = BatchNormalization(x, g, g, m, v)", g=one, m=mean,
                  v=var)  # fmt: skip
    drawn = drawn_for(proto, 64).without_extremes()
    x = np.concatenate([feed["x"] for feed in drawn.feeds])
    np.testing.assert_allclose(x.mean(axis=(0, 2, 3)), mean, atol=0.4)
    np.testing.assert_allclose(x.var(axis=(0, 2, 3)), var, rtol=0.15)


def test_features_of_a_gemm_are_fitted() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(0, 1, (40, 6))
    mean, deviation = rng.normal(0, 3, 6), rng.uniform(0.2, 4, 6)
    layer = FirstLayer(weight, np.zeros(40), 1, np.ones(6), np.zeros(6), weight @ mean,
                       np.square(weight) @ np.square(deviation))  # fmt: skip
    found = fit(layer, 1)
    assert found is not None
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.white, deviation, rtol=0.02)


def test_statistics_that_no_input_gives_are_left() -> None:
    rng = np.random.default_rng(2)
    # Channels of one and the same weight whose variances lie 30 orders of magnitude apart.
    layer = FirstLayer(np.ones((30, 2, 1)), np.zeros(30), 1, np.ones(2), np.zeros(2),
                       rng.normal(size=30), np.logspace(-15, 15, 30), (1,), (9,))  # fmt: skip
    assert fit(layer, 1) is None


def test_nonnegative_least_squares_meets_its_conditions() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        matrix, wanted = rng.normal(size=(12, 5)), rng.normal(size=12)
        found = nonnegative(matrix, wanted)
        slope = matrix.T @ (matrix @ found - wanted)
        assert (found >= 0).all()
        assert (slope > -1e-4).all()
        assert (abs(slope[found > 0]) < 1e-4).all()
