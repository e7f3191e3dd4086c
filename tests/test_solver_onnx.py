"""Level max end to end: what vanishes far from any weight, what stays, and that the model agrees.

Every row is folded, compared in float64 with the model that was given, and folded once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

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
    wide = [statistics(rng, "p8", 8), nets.batch_norm(rng, "n8", 8), nets.batch_norm(rng, "n16", 16)]
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
        "heads": np.array([0, -1, 2, 4]), "back": np.array([2, -1, 8]), "ones3": np.array([1] * 3),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "from1": np.array([1]), "to3": np.array([3]),
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
SHUFFLE = (
    "s1 = Reshape({x}, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1) {y} = Reshape(s2, four)"
)

JOINS = {
    "BatchNorm behind a Concat of four Convs": Row(
        f"{FOUR} j = Concat<axis=1>(c1, c2, c3, c4) [s] y = {bn('n16', 'j')}",
        {"Conv": 4, "Concat": 1},
    ),
    "BatchNorm on one branch before a Concat that four Convs read": Row(
        f"""r = Relu(x) [s] n = {bn("h", "r")} j = Concat<axis=1>(n, x)
            c1 = Conv(j, w8, b1) c2 = Conv(j, w8, b2) y = Add(c1, c2)""",
        {"Relu": 1, "Concat": 1, "Conv": 2, "Add": 1, BN: 1}, {"s": "BNF005"},
    ),
    "Mul behind a residual Add goes into both branches": Row(
        "c = Conv(x, w1, b1) d = Conv(x, w2, b2) t = Add(c, d) [s] y = Mul(t, zero)",
        {"Conv": 2, "Add": 1},
    ),
    "BatchNorm behind a residual Add goes into both branches": Row(
        f"c = Conv(x, w1, b1) d = Conv(x, w2, b2) t = Add(c, d) [s] y = {bn('h', 't')}",
        {"Conv": 2, "Add": 1},
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

BLOCK = """n = {first} r = Relu(n) c1 = Conv<pads=[1,1,1,1]>(r, u1) n2 = {second} r2 = Relu(n2)
    c2 = Conv<pads=[1,1,1,1]>(r2, u2) t = Add(c2, x0)"""


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
