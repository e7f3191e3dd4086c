"""Nets of one operator, and the judge of what is stated about it: it is run in other units.

For each row units are drawn that the stated operator lets through; the model is run on the true
inputs and on the stored ones, and its stored outputs have to be the true ones in the units that
the routes predict. ``free`` counts the classes of entries whose scale can be chosen: a link that
is missing makes it smaller, a wrong one makes the values disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnx_ir as ir

from bnfold.channel_graph import Operator, ShiftRule, Sign, Sum, Tie
from bnfold.onnx_facts import FLOAT_TYPES, Facts
from bnfold.onnx_shapes import infer_shapes
from bnfold.onnx_ties import find_tie
from bnfold.verify.oracle import Oracle
from tests import nets
from tests.units import Units

SIZES = {"N": 2, "C": 4, "H": 4, "W": 6, "L": 3, "K": 2}


def constants() -> dict[str, nets.Array]:
    """What the nets here are made of; `net` takes what its text names."""
    rng = np.random.default_rng(0)
    lists = {
        "i1": [1], "i2": [2], "i4": [4], "i0": [0], "i3": [3], "m1": [-1], "i01": [0, 1],
        "i23": [2, 3], "im21": [-2, -1],
        "i123": [1, 2, 3], "i10": [1, 0], "i12": [1, 2], "i0123": [0, 1, 2, 3], "none": [],
        "s_tokens": [0, 4, -1], "s_heads": [0, 2, 2, -1], "s_flat": [0, -1], "s_all": [-1],
        "s_groups": [0, 2, 2, 4, 6], "s_back": [0, 4, 4, 6], "s_merge": [-1, 4, 24],
        "s_zero": [2, 0, 3], "s_split": [-1, 4, 2, 2], "s_known": [2, 4, 4, 6],
        "s_qkv": [0, 0, 3, 2, 2], "s_wide": [2, 4, 4, 6], "s_ones": [1, 1, 1, 1],
        "s_four": [1, 1, 4, 1],
        "pad_hw": [0, 0, 1, 2, 0, 0, 1, 0], "pad_c": [0, 1, 0, 0, 0, 2, 0, 0],
        "crop_c": [0, -1, 0, 0, 0, 1, 0, 0], "pad_one": [1, 2], "pad_none": [0] * 8,
        "r1122": [1, 1, 2, 2], "r1312": [1, 3, 1, 2], "part13": [1, 3],
        "size_up": [2, 4, 7, 9], "size_hw": [7, 9],
        "far": [2**63 - 1], "near": [-(2**63)], "mixed": [-1, 0, 2], "grid_of": [[0, 1], [3, 3]],
    }  # fmt: skip
    floats = {
        "zero": 0.0,
        "one": 1.0,
        "six": 6.0,
        "infinite": np.inf,
        "lowest": -3.4028235e38,
        "up": [1.0, 1.0, 2.0, 1.5],
        "up_hw": [2.0, 1.5],
        "up_c": [1.0, 2.0, 1.0, 1.0],
        "near_one": [1.0, 1.1, 1.0, 1.0],
        "no_scales": [],
        "roi": [0.0, 0.0, 0.1, 0.2, 1.0, 1.0, 0.8, 1.0],
        "roi_c": [0.0, 0.4, 0.1, 0.2, 1.0, 1.0, 0.8, 1.0],
    }
    shaped = {"slopes": (4, 1, 1), "full": (2, 4, 4, 6), "block": (2, 2, 4, 6), "w3": (3, 4)}
    scalars = {"k1": 1, "k2": 2, "k3": 3, "km1": -1}
    return {
        **{name: np.array(value, np.int64) for name, value in lists.items()},
        **{name: np.array(value, np.int64) for name, value in scalars.items()},
        **{name: np.array(value, np.float32) for name, value in floats.items()},
        **{name: nets.weight(rng, *shape) for name, shape in shaped.items()},
        "zeros": np.zeros((1, 1, 1, 1), np.float32), "yes": np.array(True),
        "four": nets.weight(rng, 4), "one_scale": nets.weight(rng, 1),
        "rows4": nets.weight(rng, 4, 1), "image": nets.weight(rng, 2, 2, 4, 6),
    }  # fmt: skip


IMAGE = "float[2,4,4,6] x"


@dataclass(frozen=True, slots=True)
class Row:
    """A net whose statements are of ``sign`` and ``shift``, with ``free`` scales to choose.

    ``run_as`` says the same in a version that the oracle can run. ``tolerance`` is wider where
    the reference implementation rounds its weights to float32 (and scales are as small as 5e-4).
    """

    body: str
    free: int
    sign: Sign = Sign.ANY
    shift: ShiftRule = ShiftRule.EQUAL
    inputs: str = IMAGE
    outputs: str = "float[] y"
    opset: int = 17
    given: Mapping[str, nets.Array] = field(default_factory=dict)
    run_as: str = ""
    tolerance: float = 1e-9

    @property
    def runnable(self) -> Row:
        """The row as the oracle can run it."""
        return replace(self, body=self.run_as, opset=17) if self.run_as else self


def net(row: Row) -> onnx.ModelProto:
    words = nets.words(row.body)
    used = {name: value for name, value in constants().items() if name in words}
    text = f"g ({row.inputs}) => ({row.outputs}) {{ {row.body} }}"
    return nets.model(text, used, opset=row.opset)


@dataclass(frozen=True, slots=True)
class Stated:
    """The statements about a net, and the number of each value by name."""

    operators: list[Operator]
    numbers: dict[str, int]


def stated(proto: onnx.ModelProto) -> Stated | None:
    """All statements about the float activations of ``proto``; None if one node has none."""
    model = ir.from_proto(proto)
    facts = Facts(model, infer_shapes(model))
    numbers: dict[str, int] = {}

    def number(value: ir.Value) -> int:
        return numbers.setdefault(value.name or "", len(numbers))

    found: list[Operator] = []
    for node, graph in facts.nodes():
        if facts.constants.is_constant(node.outputs[0]) or node.op_type == "Shape":
            continue
        if facts.dtype(node.outputs[0]) not in FLOAT_TYPES | {None}:
            continue  # arithmetic on sizes
        operator = find_tie(facts, node, graph, number, lambda value: (value.name or "",))
        if operator is None:
            return None
        found.append(operator)
    used = {v for operator in found for v in (*operator.inputs, *operator.outputs)}
    return Stated(found, {name: value for name, value in numbers.items() if value in used})


def of_last_node(proto: onnx.ModelProto) -> Operator | None:
    """What is stated about the last node, whatever its type."""
    model = ir.from_proto(proto)
    facts = Facts(model, infer_shapes(model))
    node, graph = list(facts.nodes())[-1]
    numbers: dict[ir.Value, int] = {}
    return find_tie(facts, node, graph, lambda value: numbers.setdefault(value, len(numbers)))


def only(proto: onnx.ModelProto) -> Operator:
    """The one statement about ``proto``."""
    found = stated(proto)
    assert found is not None
    (operator,) = found.operators
    return operator


def feeds(proto: onnx.ModelProto, row: Row) -> dict[str, nets.Array]:
    rng = np.random.default_rng(1)
    result: dict[str, nets.Array] = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or SIZES.get(d.dim_param, 0) for d in tensor.shape.dim]
        result[value.name] = rng.normal(0, 1, shape)
        if tensor.elem_type == onnx.TensorProto.BOOL:
            result[value.name] = result[value.name] > 0
    return {**result, **row.given}


def every_value(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, which also gives what is inside."""
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    known = {value.name for value in wide.graph.output}
    for name in [name for node in wide.graph.node for name in node.output]:
        if name and name not in known:
            wide.graph.output.append(onnx.ValueInfoProto(name=name))
    return wide


@dataclass(frozen=True, slots=True)
class Drawn:
    """Units of every value, entry by entry."""

    scale: dict[str, nets.Array]
    shift: dict[str, nets.Array]


def draw(found: Stated, units: Units) -> Drawn:
    """Random units that the statements let through: negative and tiny scales where they may be."""
    rng = np.random.default_rng(2)
    count = 1 + max(int(units.classes(v).max(initial=0)) for v in units.shapes)
    scales = rng.uniform(0.5, 2, count) * rng.choice([1, 1, 1e-3], count)
    signs = rng.choice([-1, 1], count)
    signs[list(units.positive)] = 1
    scales *= signs
    scales[0] = 1
    scale, shift = {}, {}
    for name, value in found.numbers.items():
        classes = units.classes(value)
        own = rng.normal(0, 1, count) if isinstance(found.operators[0], Sum) else shift_of(count)
        own[list(units.no_shift)] = 0
        scale[name], shift[name] = scales[classes], own[classes]
    for operator in found.operators:
        if isinstance(operator, Sum):
            add_up(operator, found, units, shift)
    return Drawn(scale, shift)


def shift_of(count: int) -> nets.Array:
    """One shift for each class, the same for all values."""
    return np.random.default_rng(3).normal(0, 1, count)


def add_up(total: Sum, found: Stated, units: Units, shift: dict[str, nets.Array]) -> None:
    """The shift of a sum, by its equation."""
    names = {number: name for name, number in found.numbers.items()}
    out = names[total.outputs[0]]
    by_class: dict[int, float] = {}
    for sign, route in zip(total.signs, total.paths, strict=True):
        classes = units.classes(route.source).ravel()
        values = shift[names[route.source]].ravel()
        for label, value in dict(zip(classes.tolist(), values.tolist(), strict=True)).items():
            by_class[label] = by_class.get(label, 0.0) + sign * value
    classes = units.classes(found.numbers[out])
    shift[out] = np.array([by_class[k] for k in classes.ravel().tolist()]).reshape(classes.shape)


def agrees(row: Row, gate: int = 0) -> int:
    """Run ``row`` in true and in other units; how many scales could be chosen."""
    proto = net(row)
    found = stated(proto)
    assert found is not None, "nothing is stated"
    runnable = net(row.runnable)
    wide = Oracle(every_value(runnable))
    true = feeds(proto, row)
    expected = {**true, **wide.run(true)}
    shapes = {number: np.shape(expected[name]) for name, number in found.numbers.items()}
    gates = {operator.name: gate for operator in found.operators}
    units = Units(found.operators, shapes, gates)
    drawn = draw(found, units)
    stored = {
        name: (value - drawn.shift[name]) / drawn.scale[name]
        if name in drawn.scale and value.dtype.kind == "f" else value
        for name, value in true.items()
    }  # fmt: skip
    for name, value in Oracle(runnable).run(stored).items():
        back = value * drawn.scale[name] + drawn.shift[name] if name in drawn.scale else value
        np.testing.assert_allclose(
            back, expected[name], rtol=row.tolerance, atol=row.tolerance, err_msg=name
        )
    every = [units.classes(number).ravel() for number in found.numbers.values()]
    return len(set(np.concatenate(every).tolist()) - {0})


def holds(row: Row) -> None:
    """A tie is stated as ``row`` says, and it is true of the operator."""
    proto = net(row)
    found = stated(proto)
    assert found is not None, "nothing is stated"
    ties = [operator for operator in found.operators if isinstance(operator, Tie)]
    assert len(ties) == len(found.operators)
    assert {tie.sign for tie in ties} == {row.sign}
    assert {tie.shift for tie in ties} == {row.shift}
    assert agrees(row) == row.free


P, Z = Sign.POSITIVE, ShiftRule.ZERO
A, E = Sign.ANY, ShiftRule.EQUAL
TWO = "float[2,4,4,6] x, float[2,4,4,6] z"
NCHW = "float[N,4,H,W] x"
