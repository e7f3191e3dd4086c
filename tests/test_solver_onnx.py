"""Level max end to end: what vanishes far from any weight, what stays, and that the model agrees.

Every row is folded, compared in float64 with the model that was given, and folded once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest

import bnfold
from models import export_onnx
from tests import nets

BN = "BatchNormalization"
DIGITS = Path(__file__).parent.parent / "models" / "digits_resnet.onnx"


def statistics(rng: np.random.Generator, name: str, channels: int) -> dict[str, nets.Array]:
    """Those of a BatchNorm whose scales are positive, from small to large."""
    found = nets.batch_norm(rng, name, channels)
    found[f"{name}_g"] = np.geomspace(0.02, 5, channels).astype(np.float32)
    return found


def constants() -> dict[str, nets.Array]:
    """What the nets here are made of; `net` takes what its text names."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": nets.weight(rng, 4, 4, 1, 1) for i in range(1, 7)}
    padded = {f"u{i}": nets.weight(rng, 4, 4, 3, 3) for i in range(1, 5)}
    biases = {f"b{i}": nets.weight(rng, 4) for i in range(1, 7)}
    positive = [statistics(rng, name, 4) for name in ("a", "c", "e")]
    wide = [
        statistics(rng, "p8", 8),
        nets.batch_norm(rng, "n8", 8),
        nets.batch_norm(rng, "n16", 16),
    ]
    hard = [nets.batch_norm(rng, name, 4) for name in ("h", "i")]
    signed = nets.batch_norm(rng, "s", 4)
    signed["s_g"] = np.array([-1.5, 0.5, 2, -0.25], np.float32)
    return {
        **weights, **padded, **biases, **dict(pair for part in (*positive, *wide, *hard, signed)
                                              for pair in part.items()),
        "m1": nets.weight(rng, 8, 8), "m2": nets.weight(rng, 8, 8), "m3": nets.weight(rng, 8, 8),
        "row8": nets.weight(rng, 8), "row8b": nets.weight(rng, 8), "gain8": nets.weight(rng, 8),
        "w8": nets.weight(rng, 4, 8, 1, 1), "wide8": nets.weight(rng, 8, 4, 1, 1),
        "k": np.array([1.5, -2, 0.25, 3], np.float32).reshape(4, 1, 1),
        "up": np.array([1.5, 2, 0.25, 3], np.float32).reshape(4, 1, 1),
        "up2": np.array([0.5, 3, 1.25, 4], np.float32).reshape(4, 1, 1),
        "zero": np.array([1.5, 0, -0.25, 3], np.float32).reshape(4, 1, 1),
        "shift": nets.weight(rng, 4, 1, 1), "root2": np.float32(np.sqrt(2)), "one": np.float32(1),
        "half": np.float32(0.5), "eighth": np.float32(0.125), "sizes": np.array([2, 4, 12, 12]),
        "five": np.array([2, 2, 2, 6, 6]), "four": np.array([2, 4, 6, 6]), "flat": np.array([-1, 8]),
        "heads": np.array([0, -1, 2, 4]), "heads8": np.array([-1, 6, 8]), "back": np.array([2, -1, 8]), "ones3": np.array([1] * 3),
        "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "from1": np.array([1]), "to3": np.array([3]),
        "from0": np.array([0]), "to2": np.array([2]), "axis1": np.array([1]), "to4": np.array([4]),
    }  # fmt: skip


def net(body: str, inputs: str, outputs: str, **header: int) -> onnx.ModelProto:
    """A model of the text, with the constants that it names."""
    words = nets.words(body)
    used = {name: value for name, value in constants().items() if name in words}
    return nets.model(f"g ({inputs}) => ({outputs}) {{ {body} }}", used, **header)


def bn(name: str, value: str) -> str:
    """The BatchNorm ``name`` of ``value``."""
    return f"{BN}({value}, {name}_g, {name}_b, {name}_m, {name}_v)"


@dataclass(frozen=True, slots=True)
class Row:
    """A net, the operators that are left of it, and the steps that stay with their codes."""

    body: str
    left: Mapping[str, int]
    kept: Mapping[str, str] = field(default_factory=dict)
    inputs: str = "float[2,4,6,6] x"
    outputs: str = "float[A,B,C,D] y"
    opset: int = 17


IMAGE = "float[2,4,6,6] x"
LINES = "float[2,6,8] x"
OUT3 = "float[A,B,C] y"
PLAIN = {"Conv": 2}
FOUR = " ".join(f"c{i} = Conv(x, w{i}, b{i})" for i in range(1, 5))
SHUFFLE = "s1 = Reshape({x}, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1) {y} = Reshape(s2, four)"

JOINS = {
    "BatchNorm behind a Concat of four Convs": Row(
        f"{FOUR} j = Concat<axis=1>(c1, c2, c3, c4) [s] y = {bn('n16', 'j')}",
        {"Conv": 4, "Concat": 1},
    ),
    "BatchNorm on one branch before a Concat that two Convs of one weight read": Row(
        f"""r = Relu(x) [s] n = {bn("h", "r")} j = Concat<axis=1>(n, x)
            c1 = Conv(j, w8, b1) c2 = Conv(j, w8, b2) y = Add(c1, c2)""",
        {"Relu": 1, "Concat": 1, "Conv": 2, "Add": 1},
    ),
    "Mul behind a residual Add goes into both branches": Row(
        "c = Conv(x, w1, b1) d = Conv(x, w2, b2) t = Add(c, d) [s] y = Mul(t, k)",
        {"Conv": 2, "Add": 1},
    ),
    "BatchNorm behind a residual Add goes into both branches": Row(
        f"c = Conv(x, w1, b1) d = Conv(x, w2, b2) t = Add(c, d) [s] y = {bn('s', 't')}",
        {"Conv": 2, "Add": 1},
    ),
    "a gamma of 0 behind a residual Add stays, so far": Row(
        f"c = Conv(x, w1, b1) d = Conv(x, w2, b2) t = Add(c, d) [s] y = {bn('h', 't')}",
        {"Conv": 2, "Add": 1, BN: 1}, {"s": "BNF016"},
    ),
    "BatchNorm behind a Sub of three Convs": Row(
        f"""c = Conv(x, w1, b1) d = Conv(x, w2, b2) e = Conv(x, w3, b3) t = Sub(c, d)
            v = Sub(t, e) [s] y = {bn("s", "v")}""",
        {"Conv": 3, "Sub": 2},
    ),
    "BatchNorm on one branch of an Add that a Conv reads": Row(
        f"""r = Relu(x) [s] n = {bn("s", "r")} c = Conv(x, w1, b1) t = Add(n, c)
            y = Conv(t, w2, b2)""",
        {"Relu": 1, "Conv": 2, "Add": 1},
    ),
    "Add on one branch of an Add, padded Conv behind it": Row(
        "r = Relu(x) [s] n = Add(r, shift) c = Conv(x, w1, b1) t = Add(n, c) y = Conv<pads=[1,1,1,1]>(t, u1, b2)",
        {"Relu": 1, "Conv": 2, "Add": 1},
    ),
    "step over a tensor that somebody else reads": Row(
        f"""c = Conv(x, w1, b1) [s] n = {bn("a", "c")} r = Relu(n) d = Conv(r, w2, b2)
            e = Conv(c, w3, b3) y = Add(d, e)""",
        {"Conv": 3, "Relu": 1, "Add": 1},
    ),
    "step over a tensor that a Relu reads too": Row(
        f"""c = Conv(x, w1, b1) [s] n = {bn("a", "c")} d = Conv(n, w2, b2) q = Relu(c)
            e = Conv(q, w3, b3) y = Add(d, e)""",
        {"Conv": 3, "Relu": 1, "Add": 1},
    ),
}  # fmt: skip


def preactivation(first: str) -> str:
    """A pre-activation block between Convs: BatchNorm, Relu, Conv, twice, and the input added."""
    return f"""x0 = Conv(x, w1, b1) [s] n = {bn(first, "x0")} r = Relu(n)
        c1 = Conv<pads=[1,1,1,1]>(r, u1, b4) [inner] n2 = {bn("h", "c1")} r2 = Relu(n2)
        c2 = Conv<pads=[1,1,1,1]>(r2, u2, b2) t = Add(c2, x0) [last] n3 = {bn("c", "t")}
        r3 = Relu(n3) y = Conv(r3, w2, b3)"""


RESIDUAL = {
    "pre-activation block, positive gammas": Row(
        preactivation("a"), {"Conv": 4, "Relu": 3, "Add": 1}
    ),
    "pre-activation block, a negative gamma": Row(
        preactivation("s"), {"Conv": 4, "Relu": 3, "Add": 1, BN: 1}, {"s": "BNF015"}
    ),
    "pre-activation block, a gamma of 0": Row(
        preactivation("h"), {"Conv": 4, "Relu": 3, "Add": 1, BN: 1}, {"s": "BNF016"}
    ),
    "RepVGG: three branches, one the identity": Row(
        f"""x0 = Conv(x, w1, b1) r0 = Relu(x0)
            c = Conv<pads=[1,1,1,1]>(r0, u1) [n1] d = {bn("h", "c")}
            e = Conv(r0, w2) [n2] f = {bn("i", "e")} [n3] i0 = {bn("a", "r0")}
            p = Add(d, f) q = Add(p, i0) r = Relu(q) y = Conv(r, w3, b3)""",
        {"Conv": 4, "Relu": 2, "Add": 2},
    ),
    "LayerScale before a residual Add": Row(
        """m = MatMul(x, m1) a = Add(m, row8) [s] l = Mul(a, gain8) t = Add(l, x)
           y = MatMul(t, m2)""",
        {"MatMul": 2, "Add": 2}, inputs=LINES, outputs=OUT3,
    ),
}  # fmt: skip

MOVERS = {
    "AveragePool": "AveragePool<kernel_shape=[2,2]>({x})",
    "GlobalAveragePool": "GlobalAveragePool({x})",
    "ReduceMean": "ReduceMean<axes=[2,3]>({x})",
    "Resize": 'Resize<mode="linear">({x}, , , sizes)',
    "reflect Pad": 'Pad<mode="reflect">({x}, around)',
    "edge Pad": 'Pad<mode="edge">({x}, around)',
    "Identity": "Identity({x})",
}
POSITIVE_MOVERS = {
    "MaxPool": "MaxPool<kernel_shape=[2,2]>({x})",
    "GlobalMaxPool": "GlobalMaxPool({x})",
}
NO_SHIFT = {
    "constant Pad": "Pad({x}, around)",
    "Relu": "Relu({x})",
    "LeakyRelu": "LeakyRelu({x})",
}


def passing() -> dict[str, Row]:
    """What passes which operator, backward into a Conv and forward into one."""
    rows: dict[str, Row] = {}
    for name, text in {**MOVERS, **POSITIVE_MOVERS}.items():
        kind = text.split("(")[0].split("<")[0]
        signs = "a" if name in POSITIVE_MOVERS else "h"
        back = f"c = Conv(x, w1, b1) p = {text.format(x='c')} [s] y = {bn(signs, 'p')}"
        ahead = f"""r = Relu(x) [s] n = {bn(signs, "r")} p = {text.format(x="n")}
            y = Conv(p, w1, b1)"""
        rows[f"backward through {name}"] = Row(back, {"Conv": 1, kind: 1})
        rows[f"forward through {name}"] = Row(ahead, {"Relu": 1, kind: 1, "Conv": 1})
        if name in POSITIVE_MOVERS:
            rows[f"negative, backward through {name}"] = Row(
                back.replace("a_", "s_"), {"Conv": 1, kind: 1, BN: 1}, {"s": "BNF015"}
            )
    for name, text in NO_SHIFT.items():
        kind = text.split("(")[0].split("<")[0]
        back = f"c = Conv(x, w1, b1) p = {text.format(x='c')} [s] y = "
        ahead = "z = Sigmoid(x) [s] n = {step} p = %s y = Conv(p, w1, b1)" % text.format(x="n")
        rows[f"Mul, backward through {name}"] = Row(back + "Mul(p, up)", {"Conv": 1, kind: 1})
        rows[f"Mul, forward through {name}"] = Row(
            ahead.format(step="Mul(z, up)"), {"Sigmoid": 1, kind: 1, "Conv": 1}
        )
        rows[f"Add, backward through {name}"] = Row(
            back + "Add(p, shift)", {"Conv": 1, kind: 1, "Add": 1}, {"s": "BNF017"}
        )
        rows[f"Add, forward through {name}"] = Row(
            ahead.format(step="Add(z, shift)"), {"Sigmoid": 1, kind: 1, "Conv": 1, "Add": 1},
            {"s": "BNF017"},
        )  # fmt: skip
    return rows


SPLIT = "p, q = Split<axis=1>(c)"
MOVED = {
    "backward through a channel shuffle": Row(
        f"c = Conv(x, w1, b1) {SHUFFLE.format(x='c', y='p')} [s] y = {bn('h', 'p')}",
        {"Conv": 1, "Reshape": 2, "Transpose": 1},
    ),
    "forward through a channel shuffle": Row(
        f"r = Relu(x) [s] n = {bn('h', 'r')} {SHUFFLE.format(x='n', y='p')} y = Conv(p, w1, b1)",
        {"Relu": 1, "Reshape": 2, "Transpose": 1, "Conv": 1},
    ),
    "backward through a Split, one of the halves": Row(
        f"""c = Conv(x, wide8, row8) {SPLIT} [s] n = {bn("h", "p")} m = Max(q, x)
            y = Add(n, m)""",
        {"Conv": 1, "Split": 1, "Max": 1, "Add": 1},
    ),
    "backward through a Split, each half a step of its own": Row(
        f"c = Conv(x, wide8, row8) {SPLIT} [s] n = {bn('h', 'p')} [t] m = {bn('i', 'q')} y = Max(n, m)",
        {"Conv": 1, "Split": 1, "Max": 1},
    ),
    "forward through a Split": Row(
        f"""r = Relu(x) [s] c = {bn("n8", "r")} {SPLIT} d = Conv(p, w1, b1) e = Conv(q, w2, b2)
            y = Add(d, e)""",
        {"Relu": 1, "Split": 1, "Conv": 2, "Add": 1}, inputs="float[2,8,6,6] x",
    ),
    "backward through a Slice of some of the channels": Row(
        f"c = Conv(x, wide8, row8) p = Slice(c, from0, to4, axis1) [s] y = {bn('h', 'p')}",
        {"Conv": 1, "Slice": 1},
    ),
    "forward through a Slice of some of the channels": Row(
        f"r = Relu(x) [s] n = {bn('n8', 'r')} p = Slice(n, from0, to4, axis1) y = Conv(p, w1, b1)",
        {"Relu": 1, "Slice": 1, "Conv": 1}, inputs="float[2,8,6,6] x",
    ),
    "backward through Casts": Row(
        f"c = Conv(x, w1, b1) d = Cast<to=11>(c) e = Cast<to=1>(d) [s] y = {bn('h', 'e')}",
        {"Conv": 1, "Cast": 2},
    ),
    "forward through Casts": Row(
        f"""r = Relu(x) [s] n = {bn("h", "r")} d = Cast<to=11>(n) e = Cast<to=1>(d)
            y = Conv(e, w1, b1)""",
        {"Relu": 1, "Cast": 2, "Conv": 1},
    ),
    "a channel of scale 0, into the Conv before a pooling": Row(
        "c = Conv(x, w1, b1) p = AveragePool<kernel_shape=[2,2]>(c) [s] y = Mul(p, zero)",
        {"Conv": 1, "AveragePool": 1},
    ),
    "a channel of scale 0, into the Conv behind a pooling, stays so far": Row(
        """r = Relu(x) [s] n = Mul(r, zero) p = AveragePool<kernel_shape=[2,2]>(n)
           y = Conv(p, w1, b1)""",
        {"Relu": 1, "Mul": 1, "AveragePool": 1, "Conv": 1}, {"s": "BNF016"},
    ),
    "a channel of scale 0 that somebody would have to undo": Row(
        """c = Conv(x, w1, b1) [s] n = Mul(c, zero) m = Relu(n) d = Conv(c, w2, b2)
           t = Add(m, d) y = Conv(t, w3, b3)""",
        {"Relu": 1, "Mul": 1, "Conv": 3, "Add": 1}, {"s": "BNF016"},
    ),
}  # fmt: skip

LEVIT = f"""m = MatMul(x, m1) f = Reshape(m, flat) [s] n = {bn("n8", "f")} p = Reshape(n, back)
    q = Reshape(p, heads) t = Transpose<perm=[0,2,1,3]>(q) y = Softmax(t)"""
GELU = """h0 = MatMul(x, m1) h = Add(h0, row8) [div] d = Div(h, root2) e = Erf(d) [add] f = Add(e, one)
    g = Mul(h, f) [mul] i = Mul(g, half) y = MatMul(i, m2)"""
ATTENTION = """q0 = MatMul(x, m1) q = Add(q0, row8) k0 = MatMul(x, m2) k1 = Add(k0, row8b)
    kt = Transpose<perm=[0,2,1]>(k1) a = MatMul(q, kt) [s] b = {scale} y = Softmax(b)"""
GATE = """c = Conv(x, w1, b1) g = GlobalAveragePool(c) e = Conv(g, w2, b2) s0 = Sigmoid(e)
    m = Mul(c, s0) [s] n = {step} y = Conv(n, w3, b3)"""

BLOCKS = {
    "LeViT": Row(LEVIT, {"MatMul": 1, "Add": 1, "Reshape": 3, "Transpose": 1, "Softmax": 1},
                 inputs="float[2,6,8] x"),
    "LeViT, symbolic batch": Row(
        LEVIT.replace("back", "heads8"),
        {"MatMul": 1, "Add": 1, "Reshape": 3, "Transpose": 1, "Softmax": 1},
        inputs="float[N,6,8] x",
    ),
    "squeeze and excite, Mul behind the gate": Row(
        GATE.format(step="Mul(m, k)"),
        {"Conv": 3, "GlobalAveragePool": 1, "Sigmoid": 1, "Mul": 1},
    ),
    "squeeze and excite, BatchNorm before the gate": Row(
        f"""r = Relu(x) [s] c = {bn("h", "r")} g = GlobalAveragePool(c) e = Conv(g, w2, b2)
            s0 = Sigmoid(e) m = Mul(c, s0) y = Conv(m, w3, b3)""",
        {"Relu": 1, BN: 1, "GlobalAveragePool": 1, "Conv": 2, "Sigmoid": 1, "Mul": 1},
        {"s": "BNF017"},
    ),
    "squeeze and excite, Mul before the gate": Row(
        """r = Relu(x) [s] c = Mul(r, k) g = GlobalAveragePool(c) e = Conv(g, w2, b2)
           s0 = Sigmoid(e) m = Mul(c, s0) y = Conv(m, w3, b3)""",
        {"Relu": 1, "GlobalAveragePool": 1, "Conv": 2, "Sigmoid": 1, "Mul": 1},
    ),
    "GELU written out": Row(
        GELU, {"MatMul": 2, "Add": 2, "Erf": 1, "Mul": 1}, {"add": "BNF017"},
        inputs=LINES, outputs=OUT3,
    ),
    "scale of an attention": Row(
        ATTENTION.format(scale="Mul(a, eighth)"),
        {"MatMul": 3, "Add": 2, "Transpose": 1, "Softmax": 1}, inputs=LINES, outputs=OUT3,
    ),
    "division of an attention": Row(
        ATTENTION.format(scale="Div(a, root2)"),
        {"MatMul": 3, "Add": 2, "Transpose": 1, "Softmax": 1}, inputs=LINES, outputs=OUT3,
    ),
    "LayerNormalization, Mul and Add": Row(
        "n = LayerNormalization(x, gain8, row8) [s] m = Mul(n, row8b) [t] y = Add(m, row8)",
        {"LayerNormalization": 1}, inputs=LINES, outputs=OUT3,
    ),
    "LayerNormalization without a bias": Row(
        "n = LayerNormalization(x, gain8) [s] m = Mul(n, row8b) [t] y = Add(m, row8)",
        {"LayerNormalization": 1}, inputs=LINES, outputs=OUT3,
    ),
    "Mul before a LayerNormalization": Row(
        "r = Relu(x) [s] m = Mul(r, row8b) y = LayerNormalization(m, gain8, row8)",
        {"Relu": 1, "Mul": 1, "LayerNormalization": 1}, {"s": "BNF018"},
        inputs=LINES, outputs=OUT3,
    ),
}  # fmt: skip

ROWS = {**JOINS, **RESIDUAL, **passing(), **MOVED, **BLOCKS}


@pytest.mark.parametrize("name", ROWS)
def test_what_can_vanish_does_and_nothing_else(name: str) -> None:
    row = ROWS[name]
    proto = net(row.body, row.inputs, row.outputs, opset=row.opset)
    model, report = nets.folded(proto)
    assert {step.name: step.code for step in report.kept} == row.kept
    assert nets.operators(model) == row.left
    assert all(step.into or step.how == "identity" for step in report.folded)
    again, second = nets.folded(model)
    assert nets.same(model, again)
    assert not second.folded


# ---- a weight that several operators read ----

TWICE = (
    "c = Conv(x, w1, b1) d = Conv(x, w1, b2) [s] n = Mul(c, k) [t] m = Mul(d, {other}) y = {end}"
)
SHARED = {
    "they agree": (TWICE.format(other="k", end="Max(n, m)"), {}),
    "they do not": (TWICE.format(other="up", end="Max(n, m)"), {"s", "t"}),
    "one of them is scaled": ("c = Conv(x, w1) d = Conv(x, w1) [s] n = Mul(c, k) y = Max(n, d)",
                              {"s"}),
}  # fmt: skip


@pytest.mark.parametrize("agreed", SHARED)
def test_a_weight_of_two_convs_is_scaled_where_both_agree(agreed: str) -> None:
    body, stay = SHARED[agreed]
    proto = net(body, IMAGE, "float[A,B,C,D] y")
    model, report = nets.folded(proto)
    kept = {step.name: step.code for step in report.kept}
    assert set(kept) == set(stay)
    assert set(kept.values()) <= {"BNF005", "BNF020"}
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    assert len(weights) == 1
    if not stay:
        right = nets.constant(proto, "w1").astype(np.float64) * constants()["k"][:, None]
        np.testing.assert_array_equal(nets.constant(model, *weights), right.astype(np.float32))


@pytest.mark.parametrize("agreed", SHARED)
def test_a_weight_is_stored_again_only_where_asked_and_paid_for(agreed: str) -> None:
    body, stay = SHARED[agreed]
    proto = net(body, IMAGE, "float[A,B,C,D] y")
    before = nets.constant(proto, "w1").nbytes
    model, report = nets.folded(proto, unshare=True)
    assert not report.kept
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    assert len(weights) == (2 if stay else 1)
    enough, _ = nets.folded(proto, unshare=before)
    assert nets.same(enough, model)
    for limit in (False, 10, before - 1):
        model, report = nets.folded(proto, unshare=limit)
        assert {step.name for step in report.kept} == set(stay)


# ---- many scales in a row ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
def test_scales_that_compound_over_a_hundred_blocks_stay_finite(dtype: type) -> None:
    rng = np.random.default_rng(3)
    given: dict[str, nets.Array] = {}
    text, x = "", "x0"
    for i in range(1, 101):
        given |= {f"v{i}": nets.weight(rng, 4, 4, 1, 1, dtype=dtype) / dtype(8),
                  f"z{i}": nets.weight(rng, 4, dtype=dtype)}  # fmt: skip
        given |= nets.batch_norm(rng, f"n{i}", 4, dtype)
        given[f"n{i}_g"] = rng.uniform(0.3, 0.9, 4).astype(dtype)
        given[f"n{i}_v"] = rng.uniform(0.5, 1.5, 4).astype(dtype)
        given[f"n{i}_b"] = rng.uniform(0, 0.2, 4).astype(dtype)
        text += f"c{i} = Conv({x}, v{i}, z{i}) d{i} = {bn(f'n{i}', x)} s{i} = Add(c{i}, d{i}) "
        text += f"r{i} = Relu(s{i}) "
        x = f"r{i}"
    word = {"float32": "float", "float16": "float16"}[np.dtype(dtype).name]
    proto = nets.model(
        f"""g ({word}[2,4,2,2] x) => ({word}[2,4,2,2] y) {{
            i0 = Conv(x, first) x0 = Relu(i0) {text} y = Conv({x}, last) }}""",
        {**given, "first": nets.weight(rng, 4, 4, 1, 1, dtype=dtype),
         "last": nets.weight(rng, 4, 4, 1, 1, dtype=dtype)},
    )  # fmt: skip
    model, report = nets.folded(proto, 1e-5 if dtype is np.float32 else 2e-2)
    # What the type can hold of 100 factors below 1 is the limit, and no more.
    assert len(report.folded) >= (20 if dtype is np.float16 else 90)
    for tensor in model.graph.initializer:
        assert np.isfinite(nets.constant(model, tensor.name).astype(np.float64)).all()


# ---- names ----


def test_tensors_in_other_units_are_named_so_and_the_others_keep_their_names() -> None:
    row = ROWS["pre-activation block, positive gammas"]
    proto = net(row.body, row.inputs, row.outputs)
    model, _ = nets.folded(proto)
    outputs = {name for node in model.graph.node for name in node.output}
    plain = {name for node in proto.graph.node for name in node.output}
    assert {"x0_stored", "t_stored"} <= outputs
    true = values(proto, plain)
    stored = values(model, outputs)
    for name in outputs:
        if name in plain:
            np.testing.assert_allclose(stored[name], true[name], rtol=1e-4, atol=1e-5)
        else:
            old = true[name.removesuffix("_stored")]
            assert not np.allclose(stored[name], old, rtol=1e-3, atol=1e-4)


def values(proto: onnx.ModelProto, names: set[str]) -> dict[str, nets.Array]:
    """Those of the tensors ``names``, in float64."""
    opened = onnx.ModelProto.FromString(proto.SerializeToString())
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    return nets.run(opened, nets.feeds(proto))


NAMES = {
    "input and output": ("[s] y = Mul(x, one)", ["y"]),
    "input and output, two steps": ("[s] z = Mul(x, half) [t] y = Div(z, half)", ["y"]),
    "two outputs": ("z = Relu(x) [s] y = Mul(z, one)", ["y", "z"]),
    "input and one of two outputs": ("[s] y = Mul(x, one) z = Relu(x)", ["y", "z"]),
}


@pytest.mark.parametrize(("body", "outputs"), NAMES.values(), ids=NAMES.keys())
def test_inputs_and_outputs_are_never_one_tensor(body: str, outputs: list[str]) -> None:
    stated = ", ".join(f"float[2,4,6,6] {name}" for name in outputs)
    model, report = nets.folded(net(body, IMAGE, stated))
    assert report.kept
    assert all(step.code in ("BNF008", "BNF018", "BNF020") for step in report.kept)
    assert {name for node in model.graph.node for name in node.output} >= set(outputs)


# ---- ordinary networks ----


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "unet", "caffe", "digits"])
def test_an_ordinary_network_comes_out_as_the_textbook_folds_it(name: str, tmp_path: Path) -> None:
    source = DIGITS
    if name != "digits":
        source = tmp_path / "net.onnx"
        export_onnx(name, source)
    written = []
    for level in ("max", "local"):
        target = tmp_path / level / "out.onnx"
        target.parent.mkdir()
        result = bnfold.optimize(source, target, level=level, check=False)
        assert result.report.folded
        assert not result.report.kept
        written.append(target.read_bytes())
    assert written[0] == written[1]
