"""What is known of a model: every reason has a case, and no place of a graph is left out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import bnfold
from bnfold.channel_graph import Affine, Anchor, ConstantStep, Linear, Opaque, Sum, Tie
from bnfold.errors import InvalidModelError
from bnfold.onnx_describe import Described, describe
from bnfold.onnx_shapes import infer_shapes
from bnfold.planning import Reason
from tests import nets

BN = "BatchNormalization"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def constants(seed: int = 0) -> dict[str, nets.Array]:
    """What the nets here are made of; `net` takes what its text names."""
    rng = np.random.default_rng(seed)
    return {
        "w": nets.weight(rng, 4, 3, 1, 1), "v": nets.weight(rng, 4, 4, 1, 1),
        "u": nets.weight(rng, 4, 3, 3, 3), "m": nets.weight(rng, 4, 5), "k": nets.weight(rng, 4),
        "k4": nets.weight(rng, 4, 1, 1), "row": nets.weight(rng, 4), "one": np.array([2], "f"),
        "q": np.ones((4, 3, 1, 1), np.int8), "qs": np.array(0.5, np.float32),
        "qz": np.array(0, np.int8), "big": np.full(4, 1e30, np.float32),
        **nets.batch_norm(rng, "a", 4), **nets.batch_norm(rng, "p", 3),
    }  # fmt: skip


def net(body: str, inputs: str = "float[2,3,4,4] x", outputs: str = "", **header: int) -> onnx.ModelProto:
    """A model of one image and the constants that ``body`` names."""
    outputs = outputs or "float[2,4,4,4] y"
    words = set("".join(c if c.isalnum() or c == "_" else " " for c in body).split())
    used = {name: value for name, value in constants().items() if name in words}
    return nets.model(f"g ({inputs}) => ({outputs}) {{ {body} }}", used, **header)


def bn(data: str, name: str = "bn", parameters: str = "a") -> str:
    read = ", ".join(f"{parameters}_{p}" for p in "gbmv")
    return f"{BN}({data}, {read})" if not name else f"{BN}({data}, {read})"


# ---- every reason has a case ----

REASONS: dict[Reason, tuple[str, str, str]] = {
    Reason.TRAINING_MODE: (
        "c = Conv(x, w) [s] y, rm, rv = BatchNormalization<training_mode=1>(c, a_g, a_b, a_m, a_v)",
        "", "s",
    ),
    Reason.NOT_CONSTANT: (f"c = Conv(x, w) [s] y = {bn('c')}", "float[4] a_v", "'a_v'"),
    Reason.WEIGHT_NOT_CONSTANT: (f"c = Conv(x, w) [s] y = {bn('c')}", "float[4,3,1,1] w", "Conv(c)"),
    Reason.WEIGHT_TYPE: (
        f"d = DequantizeLinear(q, qs, qz) c = Conv(x, d) [s] y = {bn('c')}", "", "Conv(c)",
    ),
    Reason.SHARED_WEIGHT: (
        f"c = Conv(x, w) d = Conv(x, w) [s] b = {bn('c')} y = Max(b, d)", "", "Conv(d)",
    ),
    Reason.CHANNEL_AXIS: ("c = Conv(x, w) [s] y = Mul(c, row)", "", "Conv(c)"),
    Reason.OTHER_READER: (f"c = Conv(x, w) [s] b = {bn('c')} y = Max(b, c)", "", "Max(y)"),
    Reason.GRAPH_BOUNDARY: ("[s] y = Mul(z, one) z = Conv(x, w)", "", "'z'"),
    Reason.CAPTURED: (
        f"""c = Conv(x, w) [s] b = {bn('c')} d = If(t) <
            then_branch = th () => (float[2,4,4,4] e) {{ e = Relu(c) }},
            else_branch = el () => (float[2,4,4,4] f) {{ f = Neg(c) }}> y = Max(b, d)""",
        "bool t", "'c'",
    ),
    Reason.ZERO_PADDING: (
        f"r = Relu(x) [s] b = {bn('r', parameters='p')} y = Conv<pads=[1,1,1,1]>(b, u)", "", "Conv(y)",
    ),
    Reason.BIAS_NOT_CONSTANT: (f"c = Conv(x, w, z) [s] y = {bn('c')}", "float[4] z", "Conv(c)"),
    Reason.EXTRA_OPERATOR: (
        "t = Transpose<perm=[0,2,3,1]>(x4) r = Relu(t) [s] a = Add(r, row) y = MatMul(a, m)",
        "float[2,4,4,4] x4", "MatMul(y)",
    ),
    Reason.RANGE: ("c = Conv(x, w) d = Mul(c, big4) [s] y = Mul(d, big4)", "", "Conv(c)"),
    Reason.NO_LINEAR_NEIGHBOUR: (f"r = Relu(x4) [s] y = {bn('r')}", "float[2,4,4,4] x4", ""),
}  # fmt: skip
