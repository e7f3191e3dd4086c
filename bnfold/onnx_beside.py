"""Operators side by side that become one, written into an ONNX model: who reads what of the one.

Concat(a, b, c)   ->   Concat(ab, c)    what lies beside each other is one input
a                 ->   Slice(ab)        what is read elsewhere, by a copy
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from bnfold.channel_graph import Tie
from bnfold.onnx_describe import Described
from bnfold.onnx_edit import Editor
from bnfold.planning import Merge, Plan

Edit = Callable[[], None]

_SLICED_BY_INPUTS = 10  # the version of Slice from which on it has inputs


def with_new_values(
    described: Described, editor: Editor, plan: Plan
) -> tuple[Described, list[Edit]]:
    """The same with the new values of ``plan``, and the edits that let others read them.

    New is also what is cut from the output that it was until now: that of an operator that makes
    more channels from now on.
    """
    values = dict(enumerate(described.values))
    edits: list[Edit] = []
    for merge in plan.merges:
        own = described.graph.operators[merge.into].outputs[0]
        for number in (merge.target, *(part.value for part in merge.cuts)):
            if number >= len(described.values):
                values[number] = ir.Value(name=editor.unique(_new_name(described, merge)))
            elif merge.cuts and number == own:
                values[number] = ir.Value()
                edits.append(partial(_set_apart, described.values[number], values[number]))
    extended = replace(described, values=tuple(values[number] for number in sorted(values)))
    for index, inputs in plan.concats.items():
        edits.append(partial(_rejoin, extended, editor, index, inputs))
    return extended, edits


def _new_name(described: Described, merge: Merge) -> str:
    assert merge.concat is not None
    output = described.values[described.graph.operators[merge.concat].outputs[0]]
    return f"{output.name}_merged"


def _set_apart(output: ir.Value, part: ir.Value) -> None:
    """Whoever reads ``output`` reads ``part``, which is what it was."""
    part.name, part.shape, part.type = output.name, output.shape, output.type
    output.replace_all_uses_with(part)


def _rejoin(described: Described, editor: Editor, index: int, inputs: tuple[int, ...]) -> None:
    """Let the Concat ``index`` read ``inputs``, fewer than before."""
    node = described.values[described.graph.operators[index].outputs[0]].producer()
    assert node is not None
    node.resize_inputs(len(inputs))
    for position, number in enumerate(inputs):
        node.replace_input_with(position, editor.current(described.values[number]))


def cut(described: Described, editor: Editor, merge: Merge, made: ir.Node, graph: ir.Graph) -> None:
    """Let Slices of what ``made`` makes take the place of what ``merge`` cuts from it."""
    if merge.concat is None:
        return
    concat = described.graph.operators[merge.concat]
    assert isinstance(concat, Tie)
    whole = made.outputs[0]
    for part in merge.cuts:
        gone = described.values[part.value]
        node = ir.node("Slice", [whole], name=f"{gone.name}_cut")
        made.append(node)
        at = {"starts": part.begin, "ends": part.end, "axes": concat.joins or 0}
        for position, (name, number) in enumerate(at.items(), start=1):
            if described.facts.opset(graph) < _SLICED_BY_INPUTS:
                node.attributes[name] = ir.AttrInt64s(name, [number])
            else:
                tensor = ir.Tensor(np.array([number]))
                editor.set_constant(node, position, tensor, graph, f"{gone.name}_{name}")
        editor.take_place(node.outputs[0], gone)
