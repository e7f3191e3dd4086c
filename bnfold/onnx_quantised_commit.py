"""A fold written into the constants behind DequantizeLinear: those of a weight, and of its bias.

A DequantizeLinear that nobody else reads gets other inputs; else one more is made.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from bnfold.layout import Array
from bnfold.onnx_describe import Described
from bnfold.onnx_edit import Editor
from bnfold.onnx_facts import input_at
from bnfold.onnx_linear import LinearSite
from bnfold.onnx_quantised import Dequantised
from bnfold.onnx_quantised_fold import QuantisedFold, QuantisedTensors

SetBias = Callable[[Array, str], None]


def write_quantised(
    described: Described, editor: Editor, site: LinearSite, found: Dequantised,
    folded: QuantisedFold, shared: ir.Value | None, set_bias: SetBias, stem: str,
) -> ir.Value | None:  # fmt: skip
    """Write what was folded; returns the weight that other operators can share.

    Args:
        described: The description that the fold was made from.
        editor: Edits its model.
        site: The operator.
        found: What its weight is dequantised from.
        folded: What it is to hold.
        shared: The weight, if another operator that holds the same has it already.
        set_bias: Puts a constant into the place of the bias, under a name.
        stem: What new tensors are called after.
    """
    bias = folded.bias
    if isinstance(bias, QuantisedTensors):
        _write_bias(described, editor, site, bias, set_bias, stem)
    elif bias is not None:
        set_bias(bias, f"{stem}_bias")
    editor.sweep()
    if folded.weight is None:
        return None
    if shared is not None:
        editor.set_input(site.node, site.weight_input, shared)
        return shared
    return _write_weight(editor, site, found, folded.weight, stem)


def _write_weight(
    editor: Editor, site: LinearSite, found: Dequantised, tensors: QuantisedTensors, stem: str
) -> ir.Value | None:
    node = found.node
    if not _alone(site.node.inputs[site.weight_input], found.output):
        node = _twin(editor, site.node, node)
        read = node.outputs[0]
        if found.order != tuple(sorted(found.order)):
            read = _transposed(editor, site.node, read, found)
        editor.set_input(site.node, site.weight_input, read)
    _write(editor, node, tensors, stem)
    return site.node.inputs[site.weight_input]


def _write_bias(
    described: Described, editor: Editor, site: LinearSite, tensors: QuantisedTensors,
    set_bias: SetBias, stem: str,
) -> None:  # fmt: skip
    given = input_at(site.node, site.bias_input)
    own = described.facts.quantised_bias(given)
    if own is not None and _alone(given, own.output):
        site.node.attributes.pop("beta", None)
        _write(editor, own.node, tensors, own.integers.name or stem)
        _zero_like_scale(editor, own.node)
        return
    assert tensors.integers is not None
    set_bias(tensors.integers.numpy(), f"{stem}_bias")
    integers = site.node.inputs[site.bias_input]
    assert integers is not None
    scale = editor.constant(
        _graph_of(site.node), editor.unique(f"{integers.name}_scale"), tensors.scale, site.node
    )
    attributes = {} if tensors.axis is None else {"axis": tensors.axis}
    made = ir.node("DequantizeLinear", [integers, scale], attributes=attributes,
                   name=editor.unique(f"{integers.name}_DequantizeLinear"))  # fmt: skip
    _name(editor, made, f"{integers.name}_dequantised", tensors.scale.dtype, integers.shape)
    site.node.prepend(made)
    editor.set_input(site.node, site.bias_input, made.outputs[0])


def _write(editor: Editor, node: ir.Node, tensors: QuantisedTensors, stem: str) -> None:
    """Give a DequantizeLinear other constants."""
    graph = _graph_of(node)
    places = enumerate((tensors.integers, tensors.scale, tensors.zero_point))
    for (position, tensor), what in zip(places, ("", "_scale", "_zero_point"), strict=True):
        if tensor is not None:
            editor.set_constant(node, position, tensor, graph, f"{stem}{what}_folded")
    if tensors.axis is not None:
        node.attributes["axis"] = ir.AttrInt64("axis", tensors.axis)


def _zero_like_scale(editor: Editor, node: ir.Node) -> None:
    """Leave out the zero point of a bias, which is 0 anyway: it would need the scale's shape."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        editor.set_input(node, 2, None)
        node.resize_inputs(2)


def _alone(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether one input of one node reads ``source``, as ``value`` behind Identity."""
    while value is not None:
        if len(value.uses()) != 1 or value.is_graph_output():
            return False
        if value is source:
            return True
        producer = value.producer()
        value = None if producer is None else producer.inputs[0]
    return False


def _twin(editor: Editor, reader: ir.Node, node: ir.Node) -> ir.Node:
    """Another node that does the same, before ``reader``."""
    old = node.outputs[0]
    made = ir.node(node.op_type, list(node.inputs), attributes=dict(node.attributes),
                   name=editor.unique(f"{node.name}_folded") if node.name else None)  # fmt: skip
    _name(editor, made, f"{old.name}_folded", old.dtype, old.shape)
    reader.prepend(made)
    return made


def _transposed(editor: Editor, reader: ir.Node, value: ir.Value, found: Dequantised) -> ir.Value:
    made = ir.node("Transpose", [value], attributes={"perm": list(found.order)},
                   name=editor.unique(f"{value.name}_Transpose"))  # fmt: skip
    _name(editor, made, f"{value.name}_transposed", value.dtype, ir.Shape(found.shape))
    reader.prepend(made)
    return made.outputs[0]


def _name(
    editor: Editor, node: ir.Node, name: str, dtype: ir.DataType | None, shape: ir.Shape | None
) -> None:
    made = node.outputs[0]
    made.name, made.shape = editor.unique(name), shape
    made.type = None if dtype is None else ir.TensorType(dtype)


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph.graph if isinstance(node.graph, ir.Function) else node.graph
    assert graph is not None
    return graph
