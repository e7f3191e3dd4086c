"""Which ONNX nodes are linear along channels, and where their weight and bias are.

Conv, ConvTranspose    channels on axis 1 of the activation
Gemm                   alpha A' B' + beta C, B constant; axis 1 of a matrix
MatMul                 by a constant on either side, with the Add of a constant after it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import prod

import onnx_ir as ir

from bnfold.affine import Layout, in_channels, out_channels
from bnfold.channel_graph import Bias, Linear, Weight
from bnfold.errors import InvalidModelError
from bnfold.found import FoundLinear
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import (
    Facts,
    float_attribute,
    input_at,
    int_attribute,
    ints_attribute,
)
from bnfold.onnx_quantised import PER_AXIS_SINCE, Dequantised, weight_fault
from bnfold.onnx_taps import auto_pad, window_taps
from bnfold.quantised import line, varies


class Slot(Enum):
    """Where the bias is, or would be, written."""

    INPUT = "an optional input of the node"
    ADD = "an Add after the node"
    DYNAMIC = "computed at run time"


@dataclass(frozen=True, slots=True)
class LinearSite:
    """What a commit needs to rewrite one linear operator.

    ``add`` is the Add that is the bias of a MatMul. ``rows`` says that output channels lie on
    the axis before the last one, so that a bias made for it has shape (M, 1).
    """

    node: ir.Node
    graph: ir.Graph
    data_input: int
    weight_input: int
    layout: Layout
    slot: Slot
    bias_input: int = -1
    add: ir.Node | None = None
    becomes_gemm: bool = False
    rows: bool = False
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def output(self) -> ir.Value:
        """The activation that the operator writes, its bias included."""
        return (self.add or self.node).outputs[0]


Found = FoundLinear[LinearSite]


def find_linear(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found | None:
    """Recognise ``node`` as a linear operator, or None."""
    finder = _FINDERS.get(node.op_type)
    if finder is None or len(node.inputs) < 2 or not facts.is_plain(node):
        return None
    return finder(facts, node, graph)


def as_operator(
    facts: Facts, found: Found, number: Callable[[ir.Value], int], readers: tuple[str, ...]
) -> Linear:
    """The linear operator in the neutral vocabulary."""
    site = found.site
    data, weight = site.node.inputs[site.data_input], site.node.inputs[site.weight_input]
    assert data is not None
    assert weight is not None
    stated = _weight(facts, weight, readers, site.layout)
    shape = facts.weight_shape(weight)
    return Linear(
        name=facts.label(site.node), op_type=site.node.op_type,
        inputs=(number(data), *_other_inputs(facts, site, number)),
        outputs=(number(site.output),),
        in_axis=found.in_axis, out_axis=found.out_axis,
        in_channels=0 if shape is None else in_channels(shape, site.layout),
        out_channels=0 if shape is None else out_channels(shape, site.layout),
        weight=stated, bias=found.bias, shift_barrier=found.shift_barrier,
        groups=site.layout.groups, taps=found.taps if _holds_floats(facts, site) else None,
        biased=_is_biased(facts, site),
    )  # fmt: skip


def _holds_floats(facts: Facts, site: LinearSite) -> bool:
    """Whether its weight and its bias are stored as floats: integers can't be added to others."""
    held = (site.node.inputs[site.weight_input], bias_value(facts, site))
    return all(value is None or facts.constants.is_constant(value) for value in held)


def bias_value(facts: Facts, site: LinearSite) -> ir.Value | None:
    """The constant that is the bias of ``site`` now."""
    if site.add is not None:
        return next(v for v in site.add.inputs if facts.constants.is_constant(v))
    return input_at(site.node, site.bias_input)


def _is_biased(facts: Facts, site: LinearSite) -> bool:
    """Whether something is added that may not be 0."""
    bias = bias_value(facts, site)
    if bias is None or site.beta == 0:
        return False
    if not facts.constants.is_constant(bias):
        return True
    try:
        return bool(facts.constants.float64(bias).any())
    except UncomputableError:
        return True


def _other_inputs(
    facts: Facts, site: LinearSite, number: Callable[[ir.Value], int]
) -> tuple[int, ...]:
    """Activations that the operator reads besides its data: a computed weight or bias."""
    read = [v for i, v in enumerate(site.node.inputs) if i != site.data_input and v is not None]
    return tuple(number(value) for value in read if not _is_lent(facts, value))


def _is_lent(facts: Facts, value: ir.Value) -> bool:
    """Whether ``value`` is a constant, or one that is dequantised: none that a run computes."""
    quantised = facts.quantised_weight(value) or facts.quantised_bias(value)
    return quantised is not None or facts.constants.is_constant(value)


def _weight(
    facts: Facts, weight: ir.Value, readers: tuple[str, ...], layout: Layout
) -> Weight | None:
    if facts.constants.is_constant(weight):
        dtype = facts.constants.dtype(weight)
        name = dtype.name if dtype is not None else "UNDEFINED"
        size = prod(facts.constants.shape(weight)) * (4 if dtype is None else int(dtype.itemsize))
        view = f"{unnamed(weight).name} {layout}"
        return Weight(facts.constants.root(weight).name or "", name, readers, size, view)
    quantised = facts.quantised_weight(weight)
    if quantised is not None:
        return _quantised(facts, quantised, readers, layout)
    fault = weight_fault(facts.constants, weight)
    return Weight(weight.name or "", fault, ()) if fault else None


def _quantised(
    facts: Facts, found: Dequantised, readers: tuple[str, ...], layout: Layout
) -> Weight:
    dtype, root = facts.constants.dtype(found.scale), facts.constants.root(found.integers)
    name = root.name or ""
    integer_sums = facts.rounds_activations
    outputs = line(found.shape, layout, layout.out_axis)
    if dtype is None or (integer_sums and found.axis not in (None, outputs)):
        return Weight(name, "quantised along channels that are summed over", readers)
    widened = facts.constants.opset_of(found.node) >= PER_AXIS_SINCE
    size = int(prod(found.shape) * found.dtype.itemsize)
    view = f"{found.output.name} {found.order} {layout}"
    scales = varies(found.shape, layout, found.axis, widened=widened, summed=not integer_sums)
    return Weight(name, dtype.name, readers, size, view, scales)


def unnamed(weight: ir.Value) -> ir.Value:
    """The value that ``weight`` is another name of."""
    producer = weight.producer()
    while producer is not None and producer.op_type == "Identity" and producer.inputs[0]:
        weight = producer.inputs[0]
        producer = weight.producer()
    return weight


def _input_bias(facts: Facts, node: ir.Node) -> tuple[Slot, Bias]:
    bias = input_at(node, 2)
    if bias is None:
        return Slot.INPUT, Bias.BUILT_IN
    if facts.quantised_bias(bias) is not None and facts.quantised_weight(node.inputs[1]):
        return Slot.INPUT, Bias.BUILT_IN
    if not facts.is_float_constant(bias):
        return Slot.DYNAMIC, Bias.DYNAMIC
    if node.op_type != "Gemm":
        _refuse_bad_bias(facts, node, bias)
    return Slot.INPUT, Bias.BUILT_IN


def _refuse_bad_bias(facts: Facts, node: ir.Node, bias: ir.Value) -> None:
    """A bias that is no vector of one value a channel: runtimes refuse it when they run."""
    shape = facts.constants.shape(bias)
    made = facts.shape(node.outputs[0])
    channels = made[1] if made is not None and len(made) > 1 else None
    if len(shape) != 1 or (isinstance(channels, int) and shape[0] != channels):
        met = f"its bias has shape {list(shape)} for {channels or 'its'} channels"
        raise InvalidModelError(met, node=facts.label(node), todo="export the model again")


def _kernel(facts: Facts, node: ir.Node) -> tuple[int, ...] | None:
    stated = ints_attribute(node, "kernel_shape")
    weight = input_at(node, 1)
    shape = None if stated or weight is None else facts.weight_shape(weight)
    return stated or (None if shape is None else shape[2:])


def _conv(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found:
    slot, bias = _input_bias(facts, node)
    layout = Layout(out_axis=0, in_axis=1, groups=int_attribute(node, "group", 1))
    site = LinearSite(node, graph, 0, 1, layout, slot, bias_input=2)
    kernel = _kernel(facts, node)
    automatic = auto_pad(node)
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        padded = kernel is None or any(k != 1 for k in kernel)  # a kernel of 1 needs no padding
    else:
        padded = automatic != "VALID" and any(ints_attribute(node, "pads"))
    barrier = "it pads with zeros" if padded else ""
    return FoundLinear(site, 1, 1, barrier, bias, window_taps(facts, node, kernel))


def _conv_transpose(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found:
    slot, bias = _input_bias(facts, node)
    layout = Layout(out_axis=1, in_axis=0, groups=int_attribute(node, "group", 1))
    site = LinearSite(node, graph, 0, 1, layout, slot, bias_input=2)
    kernel = _kernel(facts, node)
    # Every output position sums over all taps only when there is one tap and no gap between.
    whole = kernel is not None and all(k == 1 for k in kernel)
    whole = whole and all(s == 1 for s in ints_attribute(node, "strides"))
    for name in ("pads", "output_padding", "output_shape"):
        whole = whole and not any(ints_attribute(node, name))
    whole = whole and auto_pad(node) in ("NOTSET", "VALID")
    return FoundLinear(site, 1, 1, "" if whole else "its sums differ from place to place", bias)


def _gemm(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found | None:
    data, weight = node.inputs[0], node.inputs[1]
    if facts.constants.is_constant(data) or weight is None:
        return None
    layout = Layout(0, 1) if int_attribute(node, "transB", 0) else Layout(1, 0)
    slot, bias = _input_bias(facts, node)
    site = LinearSite(
        node, graph, 0, 1, layout, slot, bias_input=2,
        alpha=float_attribute(node, "alpha", 1.0), beta=float_attribute(node, "beta", 1.0),
    )  # fmt: skip
    in_axis = 0 if int_attribute(node, "transA", 0) else 1
    taps = () if _is_one_row(facts, input_at(node, 2)) else None
    return FoundLinear(site, in_axis, 1, "", bias, taps)


def _is_one_row(facts: Facts, bias: ir.Value | None) -> bool:
    """Whether a bias is the same for all rows of a matrix."""
    if bias is None or not facts.constants.is_constant(bias):
        return True
    return all(size == 1 for size in facts.constants.shape(bias)[:-1])


def _matmul(facts: Facts, node: ir.Node, graph: ir.Graph) -> Found | None:
    first, second = node.inputs[0], node.inputs[1]
    if _is_weight(facts, second) and first is not None:
        return _matmul_by(facts, node, graph, data=first, position=0)
    if _is_weight(facts, first) and second is not None:
        return _matmul_by(facts, node, graph, data=second, position=1)
    return None


def _is_weight(facts: Facts, value: ir.Value | None) -> bool:
    return facts.is_float_constant(value) or facts.quantised_weight(value) is not None


def _matmul_by(
    facts: Facts, node: ir.Node, graph: ir.Graph, *, data: ir.Value, position: int
) -> Found | None:
    weight = node.inputs[1 - position]
    assert weight is not None
    shape, rank = facts.weight_shape(weight), facts.rank(data)
    assert shape is not None
    rows = position == 1
    if len(shape) < 2 or (rank is not None and rank < 2) or (rows and rank is None):
        return None
    back = 2 if rows else 1
    in_axis = -back if rank is None else rank - back
    out_axis = -back if rank is None else max(rank, len(shape)) - back
    layout = Layout(out_axis=-2, in_axis=-1) if rows else Layout(out_axis=-1, in_axis=-2)
    add = _bias_add(facts, node, shape[layout.out_axis], back)
    gemm = add is None and rank == 2 and len(shape) == 2 and not rows and facts.opset(graph) >= 7
    slot = Slot.INPUT if gemm else Slot.ADD
    site = LinearSite(node, graph, position, 1 - position, layout, slot, bias_input=2,
                      add=add, becomes_gemm=gemm, rows=rows)  # fmt: skip
    bias = Bias.BUILT_IN if add is not None or gemm else Bias.OPERATOR
    barrier = "" if all(dim == 1 for dim in shape[:-2]) else "each batch has a weight of its own"
    taps = () if len(shape) == 2 else None
    return FoundLinear(site, in_axis, out_axis, barrier, bias, taps)


def _bias_add(facts: Facts, node: ir.Node, channels: int, back: int) -> ir.Node | None:
    """The Add of a constant along the channels that alone reads a MatMul's output."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output():
        return None
    add = uses[0].node
    if add.op_type != "Add" or not facts.constants.is_standard(add) or add.graph is not node.graph:
        return None
    constant = add.inputs[1 - uses[0].idx]
    if constant is None or not facts.is_float_constant(constant) or "axis" in add.attributes:
        return None
    shape, rank = facts.constants.shape(constant), facts.rank(output)
    allowed = 1 if rank is None else rank
    lies = tuple(channels if i == len(shape) - back else 1 for i in range(len(shape)))
    return add if len(shape) <= allowed and shape in (lies, (1,) * len(shape)) else None


_FINDERS: dict[str, Callable[[Facts, ir.Node, ir.Graph], Found | None]] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul,
}  # fmt: skip
