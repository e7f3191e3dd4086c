"""Which torch operations are linear along channels, and where their weight and bias are.

    conv1d-3d convolution conv_transpose1d-3d    channels on the axis before space
    linear                                       the last axis
    addmm mm bmm matmul                          by a constant, with the add of a constant after it

A weight is a tensor that the graph holds, perhaps transposed on its way, or computed from some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from bnfold.affine import Layout, in_channels, out_channels
from bnfold.channel_graph import Bias, Linear
from bnfold.found import FoundLinear
from bnfold.torch_calls import Call
from bnfold.torch_facts import Facts, Shape
from bnfold.torch_taps import conv_taps, is_biased, whole_matrix
from bnfold.torch_weights import Readers, root_of, weight_of


@dataclass(frozen=True, slots=True, eq=False)
class LinearSite:
    """What a commit needs to rewrite one linear operator.

    Attributes:
        call: The operation.
        data: Its activation.
        weight: Its weight, as it reads it.
        weight_argument: The name of that argument.
        layout: Where the channels of the weight are, as the operation reads it.
        bias: Its bias; None when it has none.
        bias_argument: The name of that argument; empty when it has no such argument.
        add: The add of a constant that is its bias.
        views: What stands between the two and only changes the axes before the channels.
        rows: Whether output channels lie on the axis before the last one.
        alpha: What the product is multiplied by.
        beta: What the bias is multiplied by.
    """

    call: Call
    data: fx.Node
    weight: Any
    weight_argument: str
    layout: Layout
    bias: Any = None
    bias_argument: str = "bias"
    add: Call | None = None
    views: tuple[fx.Node, ...] = ()
    rows: bool = False
    alpha: float = 1.0
    beta: float = 1.0


Found = FoundLinear[LinearSite]


def find_linear(facts: Facts, call: Call) -> Found | None:
    """Recognise ``call`` as a linear operator, or None."""
    finder = _FINDERS.get(call.op)
    return None if finder is None else finder(facts, call)


# ---- convolutions ----


def _conv(facts: Facts, call: Call) -> Found | None:
    if call["transposed"]:
        return _conv_transpose(facts, call)
    barrier = "it pads with zeros" if _pads(facts, call) else ""
    found = _convolution(facts, call, Layout(0, 1, _groups(call)), barrier)
    return None if found is None else replace(found, taps=conv_taps(facts, call))


def _conv_transpose(facts: Facts, call: Call) -> Found | None:
    kernel = (facts.shape(call["weight"]) or (None,))[2:]
    # Every output position sums over all taps only when there is one tap and no gap between.
    whole = bool(kernel) and all(k == 1 for k in kernel) and not _any(call["stride"], 1)
    whole = whole and not _any(call["padding"], 0) and not _any(call["output_padding"], 0)
    barrier = "" if whole else "its sums differ from place to place"
    return _convolution(facts, call, Layout(1, 0, _groups(call)), barrier)


def _convolution(facts: Facts, call: Call, layout: Layout, barrier: str) -> Found | None:
    data, shape = call["input"], facts.shape(call["weight"])
    if not isinstance(data, fx.Node) or facts.constants.is_constant(data):
        return None
    spatial = _spatial(call, shape)
    if spatial is None:
        return None
    rank = len(facts.shape(data) or (None,) * (spatial + 2))
    axis = rank - spatial - 1
    if axis not in (0, 1):
        return None
    bias = call["bias"]
    site = LinearSite(call, data, call["weight"], "weight", layout, bias)
    return FoundLinear(site, axis, axis, barrier, _given_bias(facts, bias))


def _spatial(call: Call, weight: Shape | None) -> int | None:
    if weight is not None:
        return len(weight) - 2
    digits = [int(c) for c in call.op if c.isdigit()]
    return digits[0] if digits else None


def _groups(call: Call) -> int:
    groups = call["groups"]
    return groups if isinstance(groups, int) else 1


def _any(value: Any, but: int) -> bool:
    """Whether a stride or padding is anything else than ``but``; a computed one may be."""
    if value is None:
        return False
    return any(entry != but for entry in (value if isinstance(value, list | tuple) else [value]))


def _pads(facts: Facts, call: Call) -> bool:
    padding = call["padding"]
    if padding == "valid":
        return False
    if padding == "same":  # a kernel of 1 needs no padding
        kernel = (facts.shape(call["weight"]) or (None,) * 3)[2:]
        return any(k != 1 for k in kernel)
    return _any(padding, 0)


# ---- matrices ----


def _linear(facts: Facts, call: Call) -> Found | None:
    data, shape = call["input"], facts.shape(call["weight"])
    if not isinstance(data, fx.Node) or facts.constants.is_constant(data):
        return None
    if shape is not None and len(shape) != 2:
        return None
    site = LinearSite(call, data, call["weight"], "weight", Layout(0, 1), call["bias"])
    axis = _last(facts, data)
    taps = whole_matrix(facts, call["weight"])
    return FoundLinear(site, axis, axis, "", _given_bias(facts, call["bias"]), taps)


def _last(facts: Facts, data: fx.Node, back: int = 1) -> int:
    shape = facts.shape(data)
    return -back if shape is None else len(shape) - back


def _addmm(facts: Facts, call: Call) -> Found | None:
    data, weight, bias = call["mat1"], call["mat2"], call["input"]
    if facts.constants.is_constant(data) or not facts.constants.is_constant(weight):
        return None
    alpha, beta = (1.0 if call[name] is None else call[name] for name in ("alpha", "beta"))
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        return None
    site = LinearSite(call, data, weight, "mat2", Layout(1, 0), bias, "input",
                      alpha=float(alpha), beta=float(beta))  # fmt: skip
    stored = facts.shape(bias) if facts.constants.is_constant(bias) else None
    along = stored is not None and (len(stored) < 2 or (len(stored) == 2 and stored[0] == 1))
    taps = whole_matrix(facts, weight)
    return FoundLinear(site, 1, 1, "", Bias.BUILT_IN if along else Bias.DYNAMIC, taps)


def _matmul(facts: Facts, call: Call) -> Found | None:
    first, second = call["input"], call["other"] if call.op == "matmul" else call["mat2"]
    constant = facts.constants.is_constant
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if constant(first) == constant(second):
        return None
    return _matmul_by(facts, call, second if constant(first) else first, rows=constant(first))


def _matmul_by(facts: Facts, call: Call, data: fx.Node, *, rows: bool) -> Found | None:
    other = "other" if call.op == "matmul" else "mat2"
    argument = "input" if rows else other
    weight, known = call[argument], facts.shape(data)
    shape, rank = facts.shape(weight), None if known is None else len(known)
    if (
        shape is None
        or len(shape) < 2
        or (rank is not None and rank < 2)
        or (rows and rank is None)
    ):
        return None
    back = 2 if rows else 1
    in_axis = -back if rank is None else rank - back
    out_axis = -back if rank is None else max(rank, len(shape)) - back
    layout = Layout(-2, -1) if rows else Layout(-1, -2)
    add, views = _bias_add(facts, call, shape[layout.out_axis], back)
    if add is not None:
        made = facts.shape(add.node)
        out_axis = out_axis if made is None else len(made) - back
    bias = None if add is None else _added(facts, add)
    site = LinearSite(
        call, data, weight, argument, layout, bias, "", add=add, views=views, rows=rows
    )
    root = root_of(facts, weight, layout)
    alike = root is not None and len(facts.shape(root.argument) or ()) == 2
    single = alike or all(dim == 1 for dim in shape[:-2])
    barrier = "" if single else "each batch has a weight of its own"
    place = Bias.BUILT_IN if add else Bias.OPERATOR
    return FoundLinear(site, in_axis, out_axis, barrier, place, whole_matrix(facts, weight))


def _bias_add(
    facts: Facts, call: Call, channels: Any, back: int
) -> tuple[Call | None, tuple[fx.Node, ...]]:
    """The add of a constant along the channels that alone reads a product, and views between."""
    node, views = call.node, []
    user = _only_reader(facts, node)
    while (
        back == 1 and user is not None and user.op in _VIEWS and _keeps_last(facts, user, channels)
    ):
        node = user.node
        views.append(node)
        user = _only_reader(facts, node)
    if user is None or user.op != "add" or user["alpha"] not in (1, None):
        return None, ()
    constant = _added(facts, user)
    if constant is None or facts.constants.name(constant) is None or not facts.is_float(constant):
        return None, ()
    stored, made = facts.shape(constant), facts.shape(node)
    if stored is None:
        return None, ()
    lies = tuple(channels if i == len(stored) - back else 1 for i in range(len(stored)))
    allowed = 1 if made is None else len(made)
    fits = len(stored) <= allowed and stored in (lies, (1,) * len(stored))
    return (user, tuple(views)) if fits else (None, ())


_VIEWS = frozenset({"view", "_unsafe_view", "reshape"})


def _only_reader(facts: Facts, node: fx.Node) -> Call | None:
    """The one operation that reads ``node``, if there is one."""
    if len(node.users) != 1 or node in facts.walk.outputs:
        return None
    return facts.call_of(next(iter(node.users)))


def _keeps_last(facts: Facts, view: Call, channels: Any) -> bool:
    before, after = facts.shape(view["input"]), facts.shape(view.node)
    return bool(before and after) and before[-1] == after[-1] == channels  # type: ignore[index]


def _added(facts: Facts, add: Call) -> Any:
    """The constant that ``add`` adds to an activation; None when there are not one of each."""
    pair = [add["input"], add["other"]]
    constants = [v for v in pair if facts.constants.is_constant(v)]
    return constants[0] if len(constants) == 1 else None


def _given_bias(facts: Facts, bias: Any) -> Bias:
    if bias is None:
        return Bias.BUILT_IN
    constant = facts.constants.is_constant(bias) and len(facts.shape(bias) or ()) == 1
    return Bias.BUILT_IN if constant else Bias.DYNAMIC


_FINDERS: dict[str, Callable[[Facts, Call], Found | None]] = {
    "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "convolution": _conv,
    "conv_transpose1d": _conv_transpose, "conv_transpose2d": _conv_transpose,
    "conv_transpose3d": _conv_transpose,
    "linear": _linear, "addmm": _addmm, "mm": _matmul, "matmul": _matmul,
    "bmm": _matmul,
}  # fmt: skip


def as_operator(
    facts: Facts, found: Found, number: Callable[[fx.Node], int], readers: Readers
) -> Linear:
    """The linear operator in the neutral vocabulary."""
    site = found.site
    shape = facts.shape(site.weight) if facts.constants.is_constant(site.weight) else None
    weight = weight_of(facts, site.weight, site.layout, readers)
    sizes = tuple(int(d) for d in shape or () if isinstance(d, int))
    known = weight is not None and shape is not None and len(sizes) == len(shape)
    read = [v for v in site.call.nodes if v is not site.data and facts.is_tensor(v)]
    others = [v for v in read if not facts.constants.is_constant(v)]
    return Linear(
        name=facts.label(site.call), op_type=facts.kind(site.call),
        inputs=(number(site.data), *(number(v) for v in others)),
        outputs=(number((site.add or site.call).node),),
        in_axis=found.in_axis, out_axis=found.out_axis,
        in_channels=in_channels(sizes, site.layout) if known else 0,
        out_channels=out_channels(sizes, site.layout) if known else 0,
        weight=weight, bias=found.bias, shift_barrier=found.shift_barrier,
        groups=site.layout.groups, taps=found.taps,
        biased=site.beta != 0 and is_biased(facts, site.bias),
    )  # fmt: skip
