"""A BatchNormalization that stays, as other operators.

    affine      Mul and Add, or one of the two
    depthwise   Conv of 1x1 with a group for each channel

The last of them keeps the name of the tensor that the step makes; a constant keeps its name where
nobody else reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from bnfold.affine import AffineMap
from bnfold.channel_graph import Leftover
from bnfold.folding import leftover_numbers
from bnfold.onnx_edit import Editor, TensorLike
from bnfold.onnx_facts import FLOAT_TYPES, Facts
from bnfold.onnx_steps import StepSite

_BROADCASTS = 7  # the operator set from which on Mul and Add do so by themselves
# The operator sets from which on an operator takes a type that it did not take from the start.
_ADDED = {"Mul": {ir.DataType.BFLOAT16: 13}, "Conv": {ir.DataType.BFLOAT16: 22}}


def alternatives(facts: Facts, site: StepSite) -> frozenset[Leftover]:
    """As what other operators the step could be written in its graph.

    A Mul, an Add and their kin are one cheap operator as they are.
    """
    node, opset = site.node, facts.opset(site.graph)
    if node.op_type != "BatchNormalization" or any(v.name for v in node.outputs[1:]):
        return frozenset()
    data = node.inputs[site.data_input]
    dtype = None if data is None else facts.dtype(data)
    found = set()
    if opset >= _BROADCASTS and _takes("Mul", dtype, opset):
        found.add(Leftover.AFFINE)
    # ONNX Runtime has no Conv of doubles, on no provider.
    if dtype is not ir.DataType.DOUBLE and _takes("Conv", dtype, opset):
        found.add(Leftover.DEPTHWISE)
    return frozenset(found)


def _takes(op_type: str, dtype: ir.DataType | None, opset: int) -> bool:
    return dtype in FLOAT_TYPES and opset >= _ADDED[op_type].get(dtype, 0)


def rewritten(
    facts: Facts, editor: Editor, index: int, site: StepSite, form: Leftover, merged: AffineMap
) -> Callable[[], None]:
    """The edit that writes a step in another form, its numbers computed.

    Args:
        facts: Of the model.
        editor: Of the model.
        index: The index of the step in the channel graph.
        site: Where it is: a BatchNormalization.
        form: What it becomes.
        merged: What it does, with all that it took over.

    Raises:
        FoldRefusedError: Its numbers do not fit their type.
    """
    data = site.node.inputs[site.data_input]
    assert data is not None
    shape, dtype = facts.shape(data), facts.dtype(data)
    assert shape is not None
    assert dtype is not None
    assert isinstance(shape[1], int)
    scale, shift = leftover_numbers(index, form, merged, shape[1], dtype.numpy())
    behind = (1,) * (len(shape) - 2)
    if form is Leftover.DEPTHWISE:
        assert scale is not None
        weight = ir.Tensor(scale.reshape(-1, 1, *behind))
        return lambda: _convolve(editor, site, weight, None if shift is None else ir.Tensor(shift))
    factor, term = (
        None if v is None else ir.Tensor(v.reshape(-1, *behind)) for v in (scale, shift)
    )
    return lambda: _multiply_and_add(editor, site, factor, term)


def _convolve(editor: Editor, site: StepSite, weight: TensorLike, bias: TensorLike | None) -> None:
    node, stem = site.node, _stem(site.node)
    _become(editor, node, "Conv", 2 if bias is None else 3)
    editor.set_constant(node, 1, weight, site.graph, f"{stem}_weight")
    if bias is not None:
        editor.set_constant(node, 2, bias, site.graph, f"{stem}_bias")
    node.attributes["group"] = ir.AttrInt64("group", weight.shape.numpy()[0])
    kernel = weight.shape.numpy()[2:]
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", kernel)


def _multiply_and_add(
    editor: Editor, site: StepSite, factor: TensorLike | None, term: TensorLike | None
) -> None:
    node, stem = site.node, _stem(site.node)
    if factor is None:
        beta = node.inputs[2]
        assert term is not None
        assert beta is not None
        editor.set_input(node, 1, beta)  # so that the shift keeps its name
        _become(editor, node, "Add", 2)
        editor.set_constant(node, 1, term, site.graph, f"{stem}_shift")
        return
    _become(editor, node, "Mul", 2)
    editor.set_constant(node, 1, factor, site.graph, f"{stem}_scale")
    if term is not None:
        editor.add_after(node, term, site.graph, f"{stem}_shift")


def _become(editor: Editor, node: ir.Node, op_type: str, inputs: int) -> None:
    editor.keep_inputs(node, inputs)
    node.resize_outputs(1)
    node.attributes.clear()
    node.op_type = op_type


def _stem(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type
