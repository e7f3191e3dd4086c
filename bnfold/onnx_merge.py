"""Operators that become one, written into an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import onnx_ir as ir

from bnfold.affine import Layout, out_channels
from bnfold.channel_graph import Linear
from bnfold.folding import FoldRefusedError
from bnfold.kernels import Kernel
from bnfold.layout import Array
from bnfold.merged import MergedTensors, merged_tensors
from bnfold.onnx_beside import cut
from bnfold.onnx_describe import Described
from bnfold.onnx_edit import Editor
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import input_at
from bnfold.onnx_fold import given_bias
from bnfold.onnx_linear import LinearSite, bias_value
from bnfold.planning import Absorption, Merge, Reason

Edit = Callable[[], None]
SetBias = Callable[[LinearSite, Array], None]


def merge_edit(
    described: Described, editor: Editor, merge: Merge, taken: Absorption, set_bias: SetBias
) -> Edit:
    """What makes one operator of those in ``merge``: computed now, done when it is called.

    Args:
        described: The model.
        editor: Edits it.
        merge: Which operators become one.
        taken: What the one takes over besides.
        set_bias: Gives an operator a bias.

    Raises:
        FoldRefusedError: Something does not fit its type, or can't be computed.
    """
    site = described.sites[merge.into]
    assert isinstance(site, LinearSite)
    site = replace(site, layout=Layout(site.layout.out_axis, site.layout.in_axis, merge.groups))
    try:
        tensors = _computed(described, merge, taken, site)
    except UncomputableError as error:
        raise FoldRefusedError(merge.into, Reason.WEIGHT_NOT_CONSTANT, str(error)) from error
    nodes = list(_nodes(described, merge))
    source, target = described.values[merge.source], described.values[merge.target]
    flattened = None if merge.through is None else _made_by(described, merge.through).producer()
    name = f"{_weight(site).name}_merged"

    def edit() -> None:
        site.node.replace_input_with(site.data_input, editor.current(source))
        _read_taps(site.node, merge)
        editor.set_constant(
            site.node, site.weight_input, ir.Tensor(tensors.weight), site.graph, name
        )
        made = site.add or site.node
        if site.add is not None:  # what it reads has other channels now, too
            site.node.outputs[0].shape = None if flattened is not None else target.shape
        if flattened is not None:
            _flatten(editor, flattened, site.output, target)
        elif site.output is not target:
            editor.take_place(site.output, target)
        cut(described, editor, merge, made, site.graph)
        if tensors.bias.any() or bias_value(described.facts, site) is not None:
            set_bias(site, tensors.bias)
        site.node.attributes.pop("alpha", None)
        _leave_out(described, editor, merge)
        stay = (site.node, site.add, flattened)
        editor.drop(node for node in reversed(nodes) if node not in stay)

    return edit


def _computed(
    described: Described, merge: Merge, taken: Absorption, site: LinearSite
) -> MergedTensors:
    constants = described.facts.constants
    given = bias_value(described.facts, site)
    weight_type = constants.dtype(_weight(site))
    bias_type = weight_type if given is None else constants.dtype(given)
    assert weight_type is not None
    assert bias_type is not None

    def read(index: int) -> Kernel:
        return _kernel(described, index)

    return merged_tensors(described.graph, merge, taken, read, site.layout,
                          weight_type.numpy(), bias_type.numpy())  # fmt: skip


def _kernel(described: Described, index: int) -> Kernel:
    """What a linear operator of the model holds."""
    facts, site = described.facts, described.sites[index]
    linear = described.graph.operators[index]
    assert isinstance(site, LinearSite)
    assert isinstance(linear, Linear)
    assert linear.taps is not None
    weight = site.alpha * facts.constants.float64(_weight(site))
    channels = out_channels(weight.shape, site.layout)
    bias = given_bias(facts, site, bias_value(facts, site), channels)
    return Kernel.of(weight, site.layout, linear.taps, bias.ravel())


def _weight(site: LinearSite) -> ir.Value:
    weight = site.node.inputs[site.weight_input]
    assert weight is not None
    return weight


def _nodes(described: Described, merge: Merge) -> Iterator[ir.Node]:
    """The nodes of all operators of ``merge``, in the order of the graph."""
    for index in merge.operators:
        site = described.sites[index]
        if isinstance(site, LinearSite):
            yield site.node
        made = _made_by(described, index).producer()
        if made is not None and not (isinstance(site, LinearSite) and made is site.node):
            yield made


def _made_by(described: Described, index: int) -> ir.Value:
    return described.values[described.graph.operators[index].outputs[0]]


def _leave_out(described: Described, editor: Editor, merge: Merge) -> None:
    """Operands that are part of another one by now go from their sums."""
    for total, gone in merge.left_out.items():
        node = editor.current(_made_by(described, total)).producer()
        assert node is not None
        stay = [position for position in range(len(node.inputs)) if position not in gone]
        if len(stay) == 1:
            editor.bypass(node, stay[0], keep_output_name=False)
            continue
        for place, position in enumerate(stay):
            node.replace_input_with(place, node.inputs[position])
        editor.keep_inputs(node, len(stay))


def _flatten(editor: Editor, node: ir.Node, made: ir.Value, target: ir.Value) -> None:
    """Let ``node`` take the positions away of ``made``, which has other channels than it had."""
    # To sizes that are not those of the new channels, or of all axes of one position.
    if node.op_type == "Reshape" or (node.op_type == "Squeeze" and not _has_axes(node)):
        node.op_type = "Flatten"
        node.attributes.clear()
        editor.keep_inputs(node, 1)
    node.replace_input_with(0, made)
    made.name = editor.unique(f"{target.name}_unflattened")
    made.shape = None
    editor.take_place(node.outputs[0], target)


def _has_axes(squeeze: ir.Node) -> bool:
    return "axes" in squeeze.attributes or input_at(squeeze, 1) is not None


def _read_taps(node: ir.Node, merge: Merge) -> None:
    """Let a Conv read what all of ``merge`` read."""
    if not merge.taps:
        return
    node.attributes.pop("auto_pad", None)
    stated = {
        "kernel_shape": [taps.count for taps in merge.taps],
        "strides": [taps.stride for taps in merge.taps],
        "dilations": [taps.step for taps in merge.taps],
        "pads": [*(taps.begin for taps in merge.taps), *(taps.end for taps in merge.taps)],
    }
    for name, numbers in stated.items():
        node.attributes[name] = ir.AttrInt64s(name, numbers)
    node.attributes["group"] = ir.AttrInt64("group", merge.groups)
