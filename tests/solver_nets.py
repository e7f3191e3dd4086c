"""Small models for level max, each with what is left of it and what stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from tests import nets

BN = "BatchNormalization"


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
    positive = [statistics(rng, name, 4) for name in ("a", "c")]
    wide = [nets.batch_norm(rng, "n8", 8), nets.batch_norm(rng, "n16", 16)]
    hard = [nets.batch_norm(rng, name, 4) for name in ("h", "i")]
    signed = nets.batch_norm(rng, "s", 4)
    signed["s_g"] = np.array([-1.5, 0.5, 2, -0.25], np.float32)
    return {
        **weights, **padded, **biases, **dict(pair for part in (*positive, *wide, *hard, signed)
                                              for pair in part.items()),
        "m1": nets.weight(rng, 8, 8), "m2": nets.weight(rng, 8, 8),
        "row8": nets.weight(rng, 8), "row8b": nets.weight(rng, 8), "gain8": nets.weight(rng, 8),
        "w8": nets.weight(rng, 4, 8, 1, 1), "wide8": nets.weight(rng, 8, 4, 1, 1),
        "k": np.array([1.5, -2, 0.25, 3], np.float32).reshape(4, 1, 1),
        "up": np.array([1.5, 2, 0.25, 3], np.float32).reshape(4, 1, 1),
        "zero": np.array([1.5, 0, -0.25, 3], np.float32).reshape(4, 1, 1),
        "shift": nets.weight(rng, 4, 1, 1), "root2": np.array(np.sqrt(2), "f"),
        "one": np.array(1, "f"), "half": np.array(0.5, "f"), "eighth": np.array(0.125, "f"),
        "sizes": np.array([2, 4, 12, 12]),
        "five": np.array([2, 2, 2, 6, 6]), "four": np.array([2, 4, 6, 6]),
        "flat": np.array([-1, 8]), "heads": np.array([0, -1, 2, 4]),
        "heads8": np.array([-1, 6, 8]), "back": np.array([2, -1, 8]),
        "around": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "axis1": np.array([1]),
        "from0": np.array([0]), "to4": np.array([4]),
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


LINES = "float[2,6,8] x"
OUT3 = "float[A,B,C] y"
FOUR = "x2 = Relu(x) x3 = Sigmoid(x) x4 = Tanh(x) c1 = Conv(x, w1, b1) " + " ".join(
    f"c{i} = Conv(x{i}, w{i}, b{i})" for i in range(2, 5)
)
SHUFFLE = "s1 = Reshape({x}, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1) {y} = Reshape(s2, four)"

JOINS = {
    "BatchNorm behind a Concat of four Convs": Row(
        f"{FOUR} j = Concat<axis=1>(c1, c2, c3, c4) [s] y = {bn('n16', 'j')}",
        {"Conv": 4, "Concat": 1, "Relu": 1, "Sigmoid": 1, "Tanh": 1},
    ),
    "BatchNorm on one branch before a Concat that two Convs of one weight read": Row(
        f"""r = Relu(x) [s] n = {bn("h", "r")} j = Concat<axis=1>(n, x)
            c1 = Conv(j, w8, b1) c2 = Conv(j, w8, b2) y = Add(c1, c2)""",
        {"Relu": 1, "Concat": 1, "Conv": 2, "Add": 1},
    ),
    "Mul behind a residual Add goes into both branches": Row(
        "c = Conv(x, w1, b1) r = Relu(x) d = Conv(r, w2, b2) t = Add(c, d) [s] y = Mul(t, k)",
        {"Conv": 2, "Relu": 1, "Add": 1},
    ),
    "BatchNorm behind a residual Add goes into both branches": Row(
        f"""c = Conv(x, w1, b1) r = Relu(x) d = Conv(r, w2, b2) t = Add(c, d)
            [s] y = {bn("s", "t")}""",
        {"Conv": 2, "Relu": 1, "Add": 1},
    ),
    "a gamma of 0 behind a residual Add stays, so far": Row(
        f"""c = Conv(x, w1, b1) r = Relu(x) d = Conv(r, w2, b2) t = Add(c, d)
            [s] y = {bn("h", "t")}""",
        {"Conv": 2, "Relu": 1, "Add": 1, BN: 1}, {"s": "BNF016"},
    ),
    "BatchNorm behind a Sub of three Convs": Row(
        f"""c = Conv(x, w1, b1) r = Relu(x) d = Conv(r, w2, b2) q = Tanh(x) e = Conv(q, w3, b3)
            t = Sub(c, d) v = Sub(t, e) [s] y = {bn("s", "v")}""",
        {"Conv": 3, "Relu": 1, "Tanh": 1, "Sub": 2},
    ),
    "BatchNorm on one branch of an Add that a Conv reads": Row(
        f"""r = Relu(x) [s] n = {bn("s", "r")} c = Conv(x, w1, b1) t = Add(n, c)
            y = Conv(t, w2, b2)""",
        {"Relu": 1, "Conv": 2, "Add": 1},
    ),
    "Add on one branch of an Add, padded Conv behind it": Row(
        """r = Relu(x) [s] n = Add(r, shift) c = Conv(x, w1, b1) t = Add(n, c)
           y = Conv<pads=[1,1,1,1]>(t, u1, b2)""",
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


def preactivation(first: str, stem: str = "x0 = Conv(x, w1, b1)") -> str:
    """A pre-activation block behind ``stem``: BatchNorm, Relu, Conv, twice, and the input added."""
    return f"""{stem} [s] n = {bn(first, "x0")} r = Relu(n)
        c1 = Conv<pads=[1,1,1,1]>(r, u1, b4) [inner] n2 = {bn("h", "c1")} r2 = Relu(n2)
        c2 = Conv<pads=[1,1,1,1]>(r2, u2, b2) t = Add(c2, x0) [last] n3 = {bn("c", "t")}
        r3 = Relu(n3) y = Conv(r3, w2, b3)"""


POOLED = "i = Conv(x, w1, b1) x0 = MaxPool<kernel_shape=[2,2]>(i)"

RESIDUAL = {
    "pre-activation block, positive gammas": Row(
        preactivation("a"), {"Conv": 4, "Relu": 3, "Add": 1}
    ),
    "pre-activation block behind a MaxPool, positive gammas": Row(
        preactivation("a", POOLED), {"Conv": 4, "Relu": 3, "Add": 1, "MaxPool": 1}
    ),
    "pre-activation block behind a MaxPool, a negative gamma": Row(
        preactivation("s", POOLED),
        {"Conv": 4, "Relu": 3, "Add": 1, "MaxPool": 1, BN: 1}, {"s": "BNF015"},
    ),
    "pre-activation block, signs that differ: one of the two stays": Row(
        preactivation("s"), {"Conv": 4, "Relu": 3, "Add": 1, BN: 1}, {"last": "BNF020"}
    ),
    "pre-activation block, a gamma of 0": Row(
        preactivation("h"), {"Conv": 4, "Relu": 3, "Add": 1, BN: 1}, {"s": "BNF016"}
    ),
    "RepVGG: three branches, one the identity": Row(
        f"""x0 = Conv(x, w1, b1) r0 = Relu(x0)
            c = Conv<pads=[1,1,1,1]>(r0, u1) [n1] d = {bn("h", "c")}
            e = Conv(r0, w2) [n2] f = {bn("i", "e")} [n3] i0 = {bn("a", "r0")}
            p = Add(d, f) q = Add(p, i0) r = Relu(q) y = Conv(r, w3, b3)""",
        {"Conv": 3, "Relu": 2},
    ),
    "LayerScale before a residual Add": Row(
        """r = Relu(x) m = MatMul(r, m1) a = Add(m, row8) [s] l = Mul(a, gain8) t = Add(l, x)
           y = MatMul(t, m2)""",
        {"Relu": 1, "MatMul": 2, "Add": 2}, inputs=LINES, outputs=OUT3,
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
        # A Pad by zeros would become part of the Conv: one that repeats edges stands between.
        pads = kind == "Pad"
        then = f"e = {MOVERS['edge Pad'].format(x='p')} y = Conv(e, w1, b1)"
        ahead = f"""z = Sigmoid(x) [s] n = {{step}} p = {text.format(x="n")}
            {then if pads else "y = Conv(p, w1, b1)"}"""
        rows[f"Mul, backward through {name}"] = Row(back + "Mul(p, up)", {"Conv": 1, kind: 1})
        rows[f"Mul, forward through {name}"] = Row(
            ahead.format(step="Mul(z, up)"), {"Sigmoid": 1, kind: 1 + pads, "Conv": 1}
        )
        rows[f"Add, backward through {name}"] = Row(
            back + "Add(p, shift)", {"Conv": 1, kind: 1, "Add": 1}, {"s": "BNF017"}
        )
        rows[f"Add, forward through {name}"] = Row(
            ahead.format(step="Add(z, shift)"),
            {"Sigmoid": 1, kind: 1 + pads, "Conv": 1, "Add": 1}, {"s": "BNF017"},
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
        f"""c = Conv(x, wide8, row8) {SPLIT} [s] n = {bn("h", "p")} [t] m = {bn("i", "q")}
            y = Max(n, m)""",
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
    "a channel of scale 0, into the Conv behind a pooling": Row(
        """r = Relu(x) [s] n = Mul(r, zero) p = AveragePool<kernel_shape=[2,2]>(n)
           y = Conv(p, w1, b1)""",
        {"Relu": 1, "AveragePool": 1, "Conv": 1},
    ),
    "a channel of scale 0 that somebody would have to undo": Row(
        """c = Conv(x, w1, b1) [s] n = Mul(c, zero) m = Relu(n) d = Conv(c, w2, b2)
           t = Add(m, d) y = Conv(t, w3, b3)""",
        {"Relu": 1, "Mul": 1, "Conv": 3, "Add": 1}, {"s": "BNF016"},
    ),
}  # fmt: skip

LEVIT = f"""m = MatMul(x, m1) f = Reshape(m, flat) [s] n = {bn("n8", "f")} p = Reshape(n, back)
    q = Reshape(p, heads) t = Transpose<perm=[0,2,1,3]>(q) y = Softmax(t)"""
GELU = """h0 = MatMul(x, m1) h = Add(h0, row8) [div] d = Div(h, root2) e = Erf(d)
    [add] f = Add(e, one) g = Mul(h, f) [mul] i = Mul(g, half) y = MatMul(i, m2)"""
ATTENTION = """q0 = MatMul(x, m1) q = Add(q0, row8) k0 = MatMul(x, m2) k1 = Add(k0, row8b)
    kt = Transpose<perm=[0,2,1]>(k1) a = MatMul(q, kt) [s] b = {scale} y = Softmax(b)"""
GATE = """c = Conv(x, w1, b1) g = GlobalAveragePool(c) e = Conv(g, w2, b2) s0 = Sigmoid(e)
    m = Mul(c, s0) [s] n = {step} y = Sigmoid(n)"""

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
        {"Conv": 2, "GlobalAveragePool": 1, "Sigmoid": 2, "Mul": 1},
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
    # Runtimes recognise it when it is whole, and compute it at once.
    "GELU written out": Row(
        GELU, {"MatMul": 2, "Add": 2, "Div": 1, "Erf": 1, "Mul": 2}, inputs=LINES, outputs=OUT3,
    ),
    "what is nearly a GELU": Row(
        GELU.replace("half", "eighth"), {"MatMul": 2, "Add": 2, "Erf": 1, "Mul": 1},
        {"add": "BNF017"}, inputs=LINES, outputs=OUT3,
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
