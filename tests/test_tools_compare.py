"""The counter of `tools.compare` counts affine steps, and nothing that only looks like one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.nets import Array, batch_norm, model, weight
from tools import compare
from tools.compare import Outcome, Row, Steps, count

RNG = np.random.default_rng(7)
NET = "agraph (float[N,4,H,W] x) => (float[N,4,H,W] y) {%s}"
TOKENS = "agraph (float[N,6,4] x) => (float[N,6,5] y) {%s}"
BN, VECTOR, ONE = Steps(1, 1, 0), Steps(0, 1, 0), Steps(0, 0, 1)
NOTHING = Steps()

COLUMN = weight(RNG, 4, 1, 1)
SCALAR = np.float32(0.5)
MATRIX = {"w": weight(RNG, 4, 5), "k": weight(RNG, 5)}
SQUARE = {"v": weight(RNG, 6, 6)}

CASES: dict[str, tuple[str, dict[str, Array], Steps]] = {
    "BatchNormalization": (
        NET % "y = BatchNormalization(x, n_g, n_b, n_m, n_v)", batch_norm(RNG, "n", 4), BN),
    "BatchNormalization in training": (
        NET % "y, m, v = BatchNormalization <training_mode = 1> (x, n_g, n_b, n_m, n_v)",
        batch_norm(RNG, "n", 4), NOTHING),
    "Mul by a vector": (NET % "y = Mul(x, k)", {"k": COLUMN}, VECTOR),
    "vector on the left": (NET % "y = Sub(k, x)", {"k": COLUMN}, VECTOR),
    "Mul by a scalar": (NET % "y = Mul(x, k)", {"k": np.asarray(SCALAR)}, ONE),
    "one element of rank 4": (NET % "y = Div(x, k)", {"k": SCALAR.reshape(1, 1, 1, 1)}, ONE),
    "Div of a constant is no affine step": (NET % "y = Div(k, x)", {"k": COLUMN}, NOTHING),
    "map with two sizes": (NET % "y = Add(x, k)", {"k": weight(RNG, 4, 5, 5)}, NOTHING),
    "no constant": (NET % "y = Mul(x, x)", {}, NOTHING),
    "Neg": (NET % "y = Neg(x)", {}, ONE),
    "Neg of integers": (
        "agraph (int64[N,4] x) => (int64[N,4] y) {y = Neg(x)}", {}, NOTHING),
    "integers": (
        "agraph (int64[N,4] x) => (int64[N,4] y) {y = Mul(x, k)}",
        {"k": np.arange(4)}, NOTHING),
    "Constant node": (
        NET % "k = Constant <value = float[4,1,1] {1.5, -2.0, 0.0, 1e-6}> () y = Mul(x, k)",
        {}, VECTOR),
    "scalar Constant node": (
        NET % "k = Constant <value_float = -0.5> () y = Add(x, k)", {}, ONE),
    "Identity of a constant": (NET % "c = Identity(k) y = Add(x, c)", {"k": COLUMN}, VECTOR),
    "vector brought into shape": (
        NET % "c = Unsqueeze(k, a) y = Mul(x, c)",
        {"k": weight(RNG, 4), "a": np.asarray([1, 2])}, VECTOR),
    "arithmetic of constants": (
        NET % "c = Mul(k, s) y = Mul(x, c)", {"k": COLUMN, "s": np.asarray(SCALAR)}, VECTOR),
    "other domains": (NET % "y = custom.Mul(x, k)", {"k": COLUMN}, NOTHING),
    "bias of a MatMul": (TOKENS % "m = MatMul(x, w) y = Add(k, m)", MATRIX, NOTHING),
    "bias of a MatMul by a constant on the left": (
        "agraph (float[N,6,4] x) => (float[N,6,4] y) {m = MatMul(v, x) y = Add(m, k)}",
        SQUARE | {"k": weight(RNG, 6, 1)}, NOTHING),
    "scale of a MatMul": (TOKENS % "m = MatMul(x, w) y = Mul(m, k)", MATRIX, VECTOR),
    "second Add after a MatMul": (
        TOKENS % "m = MatMul(x, w) b = Add(m, k) y = Add(b, k)", MATRIX, VECTOR),
    "Add that is not the only reader of its MatMul": (
        TOKENS % "m = MatMul(x, w) b = Add(m, k) y = Mul(b, m)", MATRIX, VECTOR),
    "Add along another axis of a MatMul": (
        TOKENS % "m = MatMul(x, w) y = Add(m, r)", MATRIX | {"r": weight(RNG, 6, 1)}, VECTOR),
    "Add after a MatMul of two activations": (
        "agraph (float[N,6,6] x) => (float[N,6,6] y) {m = MatMul(x, x) y = Add(m, k)}",
        {"k": weight(RNG, 6)}, VECTOR),
    "constant and result whose shapes inference can't tell": (
        "agraph (float[1,1,4] x) => (float[1,1,4] y)"
        " {n = Compress(z, b) c = Expand(k, n) d = Add(x, c) y = Relu(d)}",
        {"z": np.asarray([1, 4]), "b": np.asarray([True, True]), "k": weight(RNG, 4)}, VECTOR),
    "constant whose shape inference can't tell": (
        "agraph (float[1,1,4] x) => (float[1,1,4] y)"
        " {n = Compress(z, b) c = Expand(k, n) y = Add(x, c)}",
        {"z": np.asarray([1, 4]), "b": np.asarray([True, True]), "k": weight(RNG, 4)}, VECTOR),
    "all together": (
        NET % ("a = BatchNormalization(x, n_g, n_b, n_m, n_v)"
               " b = Mul(a, k) c = Neg(b) y = Add(c, s)"),
        batch_norm(RNG, "n", 4) | {"k": COLUMN, "s": np.asarray(SCALAR)}, Steps(1, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_affine_steps_are_counted(case: str) -> None:
    text, constants, expected = CASES[case]
    assert count(model(text, constants, domains=("custom",))) == expected


def test_constant_that_a_caller_may_replace_is_none() -> None:
    text = "agraph (float[N,4] x, float[4] k) => (float[N,4] y) {y = Mul(x, k)}"
    assert count(model(text, {"k": weight(RNG, 4)}, ir=8)) == NOTHING
    assert count(model(text, {"k": weight(RNG, 4)}, ir=3)) == VECTOR


def test_large_weights_do_not_change_the_count() -> None:
    text = "agraph (float[N,256] x) => (float[N,256] y) {m = MatMul(x, w) y = Add(m, k)}"
    assert count(model(text, {"w": weight(RNG, 256, 256), "k": weight(RNG, 256)})) == NOTHING


def outcomes(**left: Steps | None) -> dict[str, Outcome]:
    return {tool: Outcome(steps, "" if steps else "crash") for tool, steps in left.items()}


PEERS = ("onnxsim", "onnxslim")
BEFORE = Steps(3, 5, 2)
ROWS: dict[str, tuple[dict[str, Outcome], bool]] = {
    "as good as the best": (outcomes(bnfold=VECTOR, onnxsim=BEFORE, onnxslim=VECTOR), False),
    "worse than the better peer": (outcomes(bnfold=BN, onnxsim=BEFORE, onnxslim=NOTHING), True),
    "more scalar steps": (outcomes(bnfold=ONE, onnxsim=NOTHING, onnxslim=BN), True),
    "a failed peer is not the best": (outcomes(bnfold=BN, onnxsim=None, onnxslim=BEFORE), False),
    "failed itself": (outcomes(bnfold=None, onnxsim=BEFORE, onnxslim=BEFORE), True),
}


@pytest.mark.parametrize("case", ROWS)
def test_bnfold_is_marked_where_it_leaves_more_than_the_best_peer(case: str) -> None:
    found, more = ROWS[case]
    row = Row("net", [0, 0], BEFORE, found)
    assert compare.leaves_more(row, PEERS) == more
    cell = compare.table([row], ["bnfold", *PEERS]).splitlines()[4].split("|")[3]
    assert ("*" in cell) == more
    assert ("failed" in cell) == (found["bnfold"].steps is None)


def test_what_is_kept_is_what_is_read_again(tmp_path: Path) -> None:
    rows = {"net": Row("net", [1, 2], BEFORE, outcomes(bnfold=BN, onnxsim=None))}
    compare.save(tmp_path / "kept.json", rows)
    assert compare.load(tmp_path / "kept.json") == rows
