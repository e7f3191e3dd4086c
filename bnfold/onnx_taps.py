"""Which positions ONNX operators read along their spatial axes, where that can be stated."""

from __future__ import annotations

import onnx_ir as ir

from bnfold.channel_graph import Taps
from bnfold.onnx_facts import Facts, int_attribute, ints_attribute


def window_taps(
    facts: Facts, node: ir.Node, kernel: tuple[int, ...] | None
) -> tuple[Taps, ...] | None:
    """Those of Conv or AveragePool; None where its padding depends on sizes that are not known."""
    if not kernel:
        return None
    ones = (1,) * len(kernel)
    strides = ints_attribute(node, "strides") or ones
    dilations = ints_attribute(node, "dilations") or ones
    pads = _pads(facts, node, kernel, strides, dilations)
    if pads is None or not len(kernel) == len(strides) == len(dilations) == len(pads) // 2:
        return None
    return tuple(map(Taps.of, kernel, strides, dilations, pads[: len(kernel)], pads[len(kernel) :]))


def auto_pad(node: ir.Node) -> str:
    """How the padding is stated."""
    attribute = node.attributes.get("auto_pad")
    return "NOTSET" if attribute is None else attribute.as_string()


def averaged_taps(facts: Facts, node: ir.Node) -> tuple[Taps, ...] | None:
    """Those of an AveragePool that divides by the same number everywhere, else None."""
    if int_attribute(node, "ceil_mode", 0):
        return None
    taps = window_taps(facts, node, ints_attribute(node, "kernel_shape") or None)
    if taps is None or int_attribute(node, "count_include_pad", 0):
        return taps
    return None if any(t.begin or t.end > 0 for t in taps) else taps


def _pads(
    facts: Facts, node: ir.Node, kernel: tuple[int, ...], strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...] | None:  # fmt: skip
    """All beginnings, then all ends."""
    automatic = auto_pad(node)
    if automatic == "NOTSET":
        return ints_attribute(node, "pads") or (0,) * (2 * len(kernel))
    if automatic == "VALID":
        return (0,) * (2 * len(kernel))
    data = node.inputs[0]
    shape = None if data is None else facts.shape(data)
    sizes = (None,) * len(kernel) if shape is None else shape[2:]
    less, more = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=False):
        if stride != 1 and not isinstance(size, int):
            return None
        whole = size if isinstance(size, int) else 1  # with stride 1 it is the same for every size
        needed = (-(-whole // stride) - 1) * stride + (k - 1) * dilation + 1 - whole
        less.append(max(0, needed) // 2)
        more.append(max(0, needed) - max(0, needed) // 2)
    return (*less, *more) if automatic == "SAME_UPPER" else (*more, *less)
