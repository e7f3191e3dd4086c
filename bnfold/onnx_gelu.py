"""GELU written out, which runtimes recognise and compute at once: one operator.

    x (1 + erf(x / sqrt 2)) / 2        Div, Erf, Add, Mul, Mul

Its constants could go into what is next to it. Then nobody recognises it any more, and what is left
takes longer than the whole did.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose, sqrt

import onnx_ir as ir

from bnfold.onnx_facts import Facts

_NEAR = 1e-2  # constants in bfloat16 have two digits and a bit


@dataclass(frozen=True, slots=True)
class Gelu:
    """The nodes of one, in order; ``source`` is what the first one reads."""

    nodes: tuple[ir.Node, ...]
    source: ir.Value


def find_gelus(facts: Facts) -> dict[ir.Node, Gelu]:
    """Every GELU of a model, under each of its nodes."""
    found = (gelu for node, _ in facts.nodes() if (gelu := _around(facts, node)) is not None)
    return {node: gelu for gelu in found for node in gelu.nodes}


def _around(facts: Facts, erf: ir.Node) -> Gelu | None:
    """The GELU that ``erf`` is in the middle of."""
    if erf.op_type != "Erf" or not facts.is_plain(erf) or erf.inputs[0] is None:
        return None
    first = erf.inputs[0].producer()
    add = _only_reader(erf)
    gate = None if add is None else _only_reader(add)
    half = None if gate is None else _only_reader(gate)
    if first is None or add is None or gate is None or half is None:
        return None
    source, nodes = first.inputs[0], (first, erf, add, gate, half)
    if _only_reader(first) is not erf or source is None:
        return None
    ours = (
        (_is_by(facts, first, "Div", sqrt(2)) or _is_by(facts, first, "Mul", sqrt(0.5)))
        and _is_by(facts, add, "Add", 1.0) and gate.op_type == "Mul" and source in gate.inputs
        and _is_by(facts, half, "Mul", 0.5) and all(facts.is_plain(node) for node in nodes)
    )  # fmt: skip
    return Gelu(nodes, source) if ours else None


def _is_by(facts: Facts, node: ir.Node, op_type: str, number: float) -> bool:
    """Whether ``node`` is that operator with this constant beside its data."""
    if node.op_type != op_type:
        return False
    return any(isclose(found, number, rel_tol=_NEAR) for found in _scalars(facts, node))


def _scalars(facts: Facts, node: ir.Node) -> Iterator[float]:
    positions = (1,) if node.op_type == "Div" else (0, 1)
    for value in (node.inputs[k] for k in positions):
        if value is not None and facts.is_float_constant(value):
            shape = facts.constants.shape(value)
            if all(size == 1 for size in shape):
                yield float(facts.constants.float64(value).ravel()[0])


def _only_reader(node: ir.Node) -> ir.Node | None:
    """Who alone reads what ``node`` makes, in the same graph."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0].node.graph is not node.graph:
        return None
    return uses[0].node
