"""Random valid ONNX models in float64: pieces of networks, appended one after another.

A piece draws the values that it reads from the pool, appends nodes and puts its results back.
`random_net` of a seed and fewer pieces begins with the same pieces. The statistics are hard:
gammas negative, zero and tiny, variances of all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.onnx_maker import DOUBLE, Impossible, Live, Maker, Net, Shape

Piece = Callable[[Maker], None]


def random_net(seed: int, pieces: int) -> Net:
    """A net of at most ``pieces`` pieces; one that does not fit is left out."""
    maker = Maker(seed)
    maker.enter()
    odds = np.array(list(PIECES.values())) ** maker.pick((1.0, 1.5))
    order = maker.rng.choice(len(PIECES), size=64, p=odds / odds.sum())
    for index in order[:pieces]:
        maker.extend(list(PIECES)[index])
    return maker.finish(seed)


def is_image(value: Live) -> bool:
    return value.axis == 1 and value.rank > 2


def is_tokens(value: Live) -> bool:
    return value.axis == 2


def is_flat(value: Live) -> bool:
    return value.rank == 2 and value.axis == 1


def is_plane(value: Live) -> bool:
    return value.axis == 1 and value.rank == 4


def once(m: Maker, op_type: str, fits: Callable[[Live], bool] = lambda _: True, **a: Any) -> None:
    """A node of one input that keeps the shape."""
    value = m.live(fits)
    m.put(value, m.node(op_type, [value.name], **a))


def partner(m: Maker, value: Live) -> Live:
    """Another value of the same shape, or one that spreads to it, or the same value."""

    def spreads(other: Live) -> bool:
        if other.rank != value.rank or other.axis != value.axis:
            return False
        return all(
            b in (1, a)
            for k in (0, 1)
            for a, b in zip(value.shapes[k], other.shapes[k], strict=True)
        )

    same = [v for v in m.pool if v.shapes == value.shapes and v.axis == value.axis]
    other = [v for v in same if v.name != value.name]
    if other and m.chance(0.8):
        return m.pick(other[-3:])
    return m.live(spreads)


# ---- linear operators ----


def conv(m: Maker) -> None:
    value = m.live(is_image)
    groups = m.pick([g for g in (1, 1, value.channels, 2) if value.channels % g == 0])
    made = groups * m.upto(max(1, 8 // groups))
    made = value.channels if m.chance(0.4) else made
    kernel = [min(m.pick((1, 1, 2, 3)), value.least(k)) for k in value.spatial]
    weight = m.weight(made, value.channels // groups, *kernel)
    attributes: dict[str, Any] = {} if groups == 1 else {"group": groups}
    value, placed = window(m, value, kernel)
    inputs = [value.name, weight]
    if m.chance(0.6):
        inputs.append(m.constant(m.rng.normal(size=made)))
    result = value.sized(1, lambda _: made)
    m.put(result, m.node("Conv", inputs, **attributes, **placed))


def window(m: Maker, value: Live, kernel: Sequence[int]) -> tuple[Live, dict[str, Any]]:
    """Attributes of a sliding window, and the value with the sizes that it leaves."""
    rank = len(kernel)
    strides = [m.pick((1, 1, 1, 2)) for _ in kernel]
    dilations = [m.pick((1, 1, 1, 2)) for _ in kernel]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if any(r > value.least(k + 2) for k, r in enumerate(reach)):
        dilations, reach = [1] * rank, list(kernel)
    placed: dict[str, Any] = {"kernel_shape": list(kernel), "strides": strides}
    if max(dilations) > 1:
        placed["dilations"] = dilations
    automatic = m.pick(("", "", "", "", "", "SAME_UPPER", "SAME_LOWER", "VALID"))
    if automatic.startswith("SAME") and max(dilations) > 1:
        automatic = ""
    pads = [m.pick((0, 0, 1, r // 2)) if r > 1 else 0 for r in (*reach, *reach)]
    if automatic:
        placed["auto_pad"] = automatic
    elif any(pads):
        placed["pads"] = pads
    for k, (r, s) in enumerate(zip(reach, strides, strict=True)):
        around = 0 if automatic else pads[k] + pads[k + rank]
        if automatic.startswith("SAME"):
            value = value.sized(k + 2, lambda size, s=s: -(-size // s))  # type: ignore[misc]
        else:
            value = value.sized(
                k + 2,
                lambda size, r=r, s=s, a=around: (size + a - r) // s + 1,  # type: ignore[misc]
            )
    return value, placed


def conv_transpose(m: Maker) -> None:
    value = m.live(is_image)
    groups = m.pick([g for g in (1, 1, value.channels, 2) if value.channels % g == 0])
    each = m.upto(max(1, 8 // groups))
    plain = m.chance(0.4)
    kernel = [1 if plain else m.pick((1, 2, 3)) for _ in value.spatial]
    strides = [1 if plain else m.pick((1, 2)) for _ in kernel]
    more = [m.pick((0, 0, s - 1)) for s in strides]
    pads = [m.pick((0, 0, (k - 1) // 2)) for k in (*kernel, *kernel)]
    attributes: dict[str, Any] = {"strides": strides} if max(strides) > 1 else {}
    attributes |= {"pads": pads} if any(pads) else {}
    attributes |= {"output_padding": more} if any(more) else {}
    attributes |= {"group": groups} if groups > 1 else {}
    inputs = [value.name, m.weight(value.channels, each, *kernel)]
    if m.chance(0.6):
        inputs.append(m.constant(m.rng.normal(size=each * groups)))
    for k, kind in enumerate(zip(kernel, strides, more, strict=True)):
        size, step, extra = kind
        taken = pads[k] + pads[k + len(kernel)]
        value = value.sized(
            k + 2,
            lambda n, a=size - taken + extra, s=step: (n - 1) * s + a,  # type: ignore[misc]
        )
    value = value.sized(1, lambda _: each * groups)
    m.put(value, m.node("ConvTranspose", inputs, **attributes))


def gemm(m: Maker) -> None:
    value = m.live(is_flat)
    made, turned, back = m.upto(8), m.chance(0.3), m.chance(0.2) and value.known(0)
    weight = m.weight(*((made, value.channels) if turned else (value.channels, made)))
    name = m.node("Transpose", [value.name], perm=[1, 0]) if back else value.name
    inputs = [name, weight]
    shapes: list[Shape] = [(made,), (1, made), (), (1, 1), (1,)]
    if m.chance(0.6) or m.opset < 11:
        inputs.append(m.constant(m.rng.normal(size=m.pick(shapes))))
    attributes: dict[str, Any] = {"transB": 1} if turned else {}
    attributes |= {"transA": 1} if back else {}
    attributes |= {"alpha": 0.5} if m.chance(0.2) else {}
    attributes |= {"beta": m.pick((2.0, 0.0, -0.5))} if m.chance(0.2) else {}
    m.put(value.sized(1, lambda _: made), m.node("Gemm", inputs, **attributes))


def matmul(m: Maker) -> None:
    value = m.live(lambda v: v.axis == v.rank - 1)
    made = m.upto(8) if m.chance() else value.channels
    name = m.node("MatMul", [value.name, m.weight(value.channels, made)])
    result = value.sized(value.axis, lambda _: made)
    if m.chance():
        bias = m.constant(m.rng.normal(size=made))
        name = m.node("Add", [name, bias] if m.chance() else [bias, name])
    m.put(result, name)


def matmul_left(m: Maker) -> None:
    """A constant on the left mixes the axis before the last one."""
    value = m.live(lambda v: v.rank > 2 and v.known(v.rank - 2))
    axis = value.rank - 2
    size = value.shapes[0][axis]
    made = m.upto(6) if m.chance() else size
    name = m.node("MatMul", [m.weight(made, size), value.name])
    if m.chance(0.4):
        name = m.node("Add", [name, m.constant(m.rng.normal(size=(made, 1)))])
    m.put(value.sized(axis, lambda _: made), name)


def batched_weight(m: Maker) -> None:
    """A weight for each entry of the axis in front of the two that are multiplied."""
    value = m.live(lambda v: v.rank == 4 and v.known(1))
    heads, width = value.shapes[0][1], value.shapes[0][3]
    if not value.known(3):
        raise Impossible
    made = m.upto(5)
    m.put(
        value.sized(3, lambda _: made), m.node("MatMul", [value.name, m.weight(heads, width, made)])
    )


# ---- affine steps ----


def batch_norm(m: Maker) -> None:
    normalised(m, m.live(lambda v: v.axis == 1))


def normalised(m: Maker, value: Live) -> Live:
    """``value`` behind a BatchNormalization with statistics as hard as they come."""
    size = value.channels
    gamma = m.scales(size)
    variance = m.rng.uniform(0.05, 4, size)
    if m.chance(0.3) and m.affords(2):
        variance *= m.pick((1e-2, 1e3))
    if m.chance(0.1):
        variance[m.upto(size) - 1] = 0
    rest = [gamma, m.rng.normal(size=size), m.rng.normal(size=size), variance]
    attributes: dict[str, Any] = {} if m.chance() else {"epsilon": 1e-3}
    inputs = [value.name, *(m.constant(v) for v in rest)]
    return m.put(value, m.node("BatchNormalization", inputs, **attributes))


def affine(m: Maker) -> None:
    """Mul, Add, Sub or Div by a constant along the channels or of one element, on either side."""
    value = m.live()
    op_type = m.pick(("Mul", "Add", "Mul", "Add", "Sub", "Div"))
    size = 1 if m.chance(0.25) else value.channels
    values = m.scales(size, zero=op_type == "Mul")
    if op_type in ("Add", "Sub"):
        values = m.rng.normal(size=size)
    constant = (
        m.constant(values.reshape(m.pick(((), (1,))))) if size == 1 else m.along(value, values)
    )
    first = op_type != "Div" and m.chance(0.4)
    inputs = [constant, value.name] if first else [value.name, constant]
    m.put(value, m.node(op_type, inputs))


def off_axis(m: Maker) -> None:
    """A constant along some other axis than the channels, or along two of them."""
    value = m.live(lambda v: v.rank > 2)
    axes = [k for k in range(1, value.rank) if value.known(k)]
    if not axes:
        raise Impossible
    first = m.pick(axes)
    lies = {first, m.pick(axes)} if m.chance(0.4) else {first}
    shape = [value.shapes[0][k] if k in lies else 1 for k in range(value.rank)]
    constant = m.constant(m.rng.normal(1, 0.5, shape))
    m.put(value, m.node(m.pick(("Mul", "Add", "Sub")), [value.name, constant]))


def negated(m: Maker) -> None:
    once(m, "Neg")


def enlarging(m: Maker) -> None:
    """A constant that repeats what it meets."""
    value = m.live(lambda v: v.channels == 1)
    made = m.upto(5, 2)
    constant = m.along(value, m.scales(made))
    m.put(
        value.sized(value.axis, lambda _: made),
        m.node(m.pick(("Mul", "Add")), [value.name, constant]),
    )


# ---- element by element ----


def activation(m: Maker) -> None:
    value = m.live()
    kind = m.pick(("Relu", "Relu", "LeakyRelu", "PRelu", "Abs", "Clip", "ThresholdedRelu"))
    kind = "Relu" if m.opset < 10 and kind == "ThresholdedRelu" else kind
    if kind == "PRelu":
        slopes = m.rng.normal(size=1 if m.chance(0.3) else value.channels)
        name = m.node(kind, [value.name, m.along(value, slopes)])
    elif kind == "Clip":
        name = clipped(m, value)
    else:
        options: dict[str, dict[str, Any]] = {
            "ThresholdedRelu": {"alpha": 0.0},
            "LeakyRelu": {"alpha": 0.1},
        }
        name = m.node(kind, [value.name], **options.get(kind, {}))
    m.put(value, name)


def clipped(m: Maker, value: Live) -> str:
    low, high = m.pick(((0.0, None), (0.0, 6.0), (None, 0.0), (-1.0, 1.0), (None, None)))
    if m.opset < 11:
        bounds: dict[str, Any] = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
        return str(m.node("Clip", [value.name], **bounds))
    inputs = ["" if v is None else m.constant(v) for v in (low, high)]
    return str(m.node("Clip", [value.name, *inputs]))


def renaming(m: Maker) -> None:
    kind = m.pick(("Identity", "Dropout", "Cast", "CastLike", "narrow"))
    value = m.live()
    if kind == "narrow":
        name = m.node("Cast", [value.name], to=TensorProto.FLOAT)
        m.put(value, m.node("Cast", [name], to=DOUBLE))
    elif kind == "CastLike" and m.opset >= 15:
        m.put(value, m.node(kind, [value.name, m.live().name]))
    elif kind == "Cast":
        m.put(value, m.node(kind, [value.name], to=DOUBLE))
    else:
        m.put(value, m.node(m.pick(("Identity", "Dropout")), [value.name]))


def opaque(m: Maker) -> None:
    once(m, m.pick(("Sigmoid", "Tanh", "Erf", "Softmax")))


def gelu(m: Maker) -> None:
    value = m.live()
    inner = m.node("Div", [value.name, m.constant(np.sqrt(2.0))])
    inner = m.node("Add", [m.node("Erf", [inner]), m.constant(1.0)])
    last = m.node("Mul", [value.name, inner])
    m.put(value, m.node("Mul", [last, m.constant(0.5)]))


def silu(m: Maker) -> None:
    value = m.live()
    gate = m.node("Sigmoid", [value.name])
    m.put(value, m.node("Mul", [value.name, gate] if m.chance() else [gate, value.name]))


def hard_swish(m: Maker) -> None:
    value = m.live()
    inner = m.node("Add", [value.name, m.constant(3.0)])
    inner = clipped(m, replace(value, name=inner))
    m.put(value, m.node("Div", [m.node("Mul", [value.name, inner]), m.constant(6.0)]))


# ---- several values ----


def residual(m: Maker) -> None:
    value = m.live()
    other = partner(m, value)
    names = [value.name, other.name] if m.chance() else [other.name, value.name]
    if m.chance(0.3):
        names += [m.pick((value, other)).name]
        m.put(value, m.node("Sum", names))
    else:
        m.put(value, m.node(m.pick(("Add", "Add", "Sub")), names))


def residual_conv(m: Maker) -> None:
    """A block that keeps the shape, and its input added to what it gives."""
    value = m.live(is_image)
    middle, size = value, value.channels
    for _ in range(m.upto(2)):
        weight = m.weight(size, size, *[1] * len(value.spatial))
        middle = m.put(value, m.node("Conv", [middle.name, weight]))
        if m.chance(0.7):
            middle = normalised(m, middle)
        if m.chance(0.4):
            middle = m.put(value, m.node("Relu", [middle.name]))
    m.put(value, m.node("Add", [middle.name, value.name]))


def extreme(m: Maker) -> None:
    value = m.live()
    names = [value.name, partner(m, value).name]
    if m.chance(0.3):
        names[1] = m.constant(m.pick((0.0, 0.5)))
    m.put(value, m.node(m.pick(("Max", "Min", "Mean")), names))


def where(m: Maker) -> None:
    value = m.live()
    other = m.constant(0.0) if m.chance(0.3) else partner(m, value).name
    size = m.pick((1, value.channels))
    truth = m.rng.random(size) < 0.5
    back = value.rank - value.axis - 1
    condition = m.constant(truth.reshape([size, *[1] * back]), np.bool_)
    if m.chance(0.5):
        condition = m.fresh("t")
        m.inputs[condition] = None
    names = [value.name, other] if m.chance() else [other, value.name]
    m.put(value, m.node("Where", [condition, *names]))


def product(m: Maker) -> None:
    value = m.live()
    other = partner(m, value)
    if m.chance(0.5):
        other = replace(other, name=m.node("Sigmoid", [other.name]))
    m.put(
        value, m.node("Mul", [value.name, other.name] if m.chance() else [other.name, value.name])
    )


def quotient(m: Maker) -> None:
    value = m.live()
    low = m.node("Add", [m.node("Abs", [partner(m, value).name]), m.constant(1.0)])
    m.put(value, m.node("Div", [value.name, low]))


def squeeze_excite(m: Maker) -> None:
    value = m.live(is_image)
    size, inner = value.channels, m.upto(4)
    ones = [1] * len(value.spatial)
    gate = m.node("GlobalAveragePool", [value.name])
    gate = m.node("Conv", [gate, m.weight(inner, size, *ones)])
    if m.chance():
        rest = (m.scales(inner), m.rng.normal(size=inner), m.rng.normal(size=inner),
                m.rng.uniform(0.1, 2, inner))  # fmt: skip
        gate = m.node("BatchNormalization", [gate, *map(m.constant, rest)])
    gate = m.node("Relu", [gate])
    gate = m.node("Sigmoid", [m.node("Conv", [gate, m.weight(size, inner, *ones)])])
    m.put(value, m.node("Mul", [value.name, gate]))


def attention(m: Maker) -> None:
    """Heads by Reshape and Transpose, two MatMuls of activations with a Softmax, and back."""
    value = m.live(lambda v: is_tokens(v) and v.known(1))
    (tokens, _), heads = value.shapes[0][1:], m.pick((1, 2))
    width = heads * m.upto(2)

    def part(perm: Sequence[int]) -> str:
        name = m.node("MatMul", [value.name, m.weight(value.channels, width)])
        if m.chance():
            name = m.node("Add", [name, m.constant(m.rng.normal(size=width))])
        split = m.node("Reshape", [name, m.ints([0, tokens, heads, width // heads])])
        return str(m.node("Transpose", [split], perm=list(perm)))

    scores = m.node("MatMul", [part((0, 2, 1, 3)), part((0, 2, 3, 1))])
    scores = m.node("Mul", [scores, m.constant(0.5)])
    mixed = m.node("MatMul", [m.node("Softmax", [scores], axis=-1), part((0, 2, 1, 3))])
    if m.chance(0.4):
        mixed = m.node("Mul", [mixed, m.constant(m.scales(heads).reshape(heads, 1, 1))])
    joined = m.node("Transpose", [mixed], perm=[0, 2, 1, 3])
    joined = m.node("Reshape", [joined, m.ints([0, tokens, width])])
    m.put(value.sized(2, lambda _: width), joined)


def captured(m: Maker) -> None:
    """An If whose branches read a value from outside."""
    value = m.live()
    condition = m.fresh("t")
    m.inputs[condition] = None

    def branch(op_type: str) -> Any:
        name = m.fresh("b")
        node = helper.make_node(op_type, [value.name], [name])
        info = helper.make_tensor_value_info(name, DOUBLE, [None] * value.rank)
        return helper.make_graph([node], op_type.lower(), [], [info])

    last = m.pick(("Neg", "Relu"))
    made = m.node("If", [condition], then_branch=branch("Identity"), else_branch=branch(last))
    m.put(value, made)


# ---- normalisations ----


def norm(m: Maker) -> None:
    value = m.live()
    size, last = value.channels, value.shapes[0][-1]
    if is_image(value) and m.chance(0.6):
        grouped = m.opset >= 21 and m.chance()
        rest = [m.constant(m.scales(size)), m.constant(m.rng.normal(size=size))]
        if grouped:
            groups = m.pick([g for g in (1, 2, size) if size % g == 0])
            name = m.node("GroupNormalization", [value.name, *rest], num_groups=groups)
        else:
            name = m.node("InstanceNormalization", [value.name, *rest], epsilon=1e-2)
    elif m.opset >= 17 and value.known(value.rank - 1):
        rest = [m.constant(m.scales(last))]
        rest += [m.constant(m.rng.normal(size=last))] if m.chance(0.7) else []
        kind = "RMSNormalization" if m.opset >= 23 and m.chance() else "LayerNormalization"
        rest = rest[:1] if kind == "RMSNormalization" else rest
        axis = m.pick((-1, value.rank - 1))
        name = m.node(kind, [value.name, *rest], axis=axis, epsilon=1e-2)
    else:
        raise Impossible
    m.put(value, name)


# ---- pooling and reductions ----


def pool(m: Maker) -> None:
    value = m.live(is_image)
    kind = m.pick(("MaxPool", "MaxPool", "AveragePool", "AveragePool", "LpPool"))
    kernel = [min(m.pick((1, 2, 3)), value.least(k)) for k in value.spatial]
    value, placed = window(m, value, kernel)
    if kind == "LpPool" and "auto_pad" in placed:
        raise Impossible  # the oracle can't
    lacks = {"AveragePool": 19, "LpPool": 18, "MaxPool": 10}[kind]
    if "dilations" in placed and m.opset < lacks:
        raise Impossible
    pads = placed.get("pads", [0])
    if any(p >= k for p, k in zip(pads, (*kernel, *kernel), strict=False)):
        raise Impossible
    if kind == "AveragePool" and m.chance():
        placed["count_include_pad"] = 1
    m.put(value, m.node(kind, [value.name], **placed))


def global_pool(m: Maker) -> None:
    value = m.live(is_image)
    kind = m.pick(("GlobalMaxPool", "GlobalAveragePool"))
    kind = "GlobalAveragePool" if value.rank != 4 else kind  # the oracle makes another rank
    m.put(value.without(value.spatial, keep=True), m.node(kind, [value.name]))


def reduction(m: Maker) -> None:
    kind = m.pick(("Max", "Min", "Mean", "L1", "L2", "Sum", "Sum", "Mean"))
    value = m.live(lambda v: v.rank > 2)
    axes = list(value.spatial) or [1]
    if m.chance(0.2):
        axes = [value.axis]  # over the channels
    elif m.chance(0.4):
        axes = [m.pick(axes)]
    keep = m.chance() or value.axis in axes
    written = [k - value.rank if m.chance(0.3) else k for k in axes]
    since = 13 if kind == "Sum" else 18
    name = m.with_ints(f"Reduce{kind}", value.name, since, axes=written, keepdims=int(keep))
    m.put(value.without(axes, keep=keep), name)


def cumulated(m: Maker) -> None:
    if m.opset < 11:
        raise Impossible
    value = m.live(lambda v: v.rank > 2)
    axis = m.pick([k for k in range(1, value.rank) if k != value.axis or m.chance(0.1)] or [1])
    m.put(value, m.node("CumSum", [value.name, m.constant(axis, np.int64)]))


def triangle(m: Maker) -> None:
    if m.opset < 14:
        raise Impossible
    once(m, "Trilu", lambda v: v.rank > 2, upper=int(m.chance()))


def resize(m: Maker) -> None:
    value = m.live(lambda v: is_image(v) and v.rank < 5)
    ratio = m.pick((2.0, 2.0, 0.5, 1.5))
    made = value
    for k in value.spatial:
        made = made.sized(k, lambda size: int(np.floor(size * ratio)))
    scales = m.constant([1.0, 1.0, *[ratio] * len(value.spatial)], np.float32)
    if m.opset < 10:
        if ratio != 2:
            raise Impossible  # the oracle has no other
        m.put(made, m.node("Upsample", [value.name, scales], mode="nearest"))
        return
    where = m.pick(("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"))
    mode = m.pick(("nearest", "linear", "cubic")) if value.rank == 4 else "nearest"
    if ratio == 1.5 or where == "align_corners":
        mode = "nearest"  # the oracle's weights are exact only at even places
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": where}
    inputs = [value.name, "", scales]
    if m.chance(0.3) and all(value.known(k) for k in range(value.rank)):
        inputs = [value.name, "", "", m.ints(made.shapes[0])]
    m.put(made, m.node("Resize", inputs, **attributes))


def sampled(m: Maker) -> None:
    """Regions or a grid of an image, at places that are constants."""
    value = m.live(is_plane)
    if m.opset < 16:
        raise Impossible
    if m.chance():
        corner = m.rng.integers(0, 3, (3, 2)) / 2
        boxes = m.constant(np.hstack([corner, corner + m.pick((1, 2))]))
        name = m.node("RoiAlign", [value.name, boxes, m.ints([0, 1, 1])],
                      output_height=2, output_width=2)  # fmt: skip
        three = value.sized(0, lambda _: 3)
    elif value.known(0):
        grid = m.constant(m.rng.integers(-4, 5, (value.shapes[0][0], 2, 2, 2)) / 4)
        padding = m.pick(("zeros", "border", "reflection"))
        name = m.node("GridSample", [value.name, grid], padding_mode=padding)
        three = value
    else:
        raise Impossible
    m.put(three.sized(2, lambda _: 2).sized(3, lambda _: 2), name)


# ---- elements that move ----


def pad(m: Maker) -> None:
    value = m.live(lambda v: v.rank > 2)
    modes = ("constant", "constant", "edge", "reflect", *(("wrap",) if m.opset >= 19 else ()))
    mode = m.pick(modes)
    axes = list(value.spatial) or [1]
    if mode == "constant" and m.chance(0.3):
        axes = [value.axis]
    low = -1 if mode == "constant" else 0
    around = {k: (m.upto(1, low), m.upto(1, low)) for k in axes if value.least(k) > 2}
    before = [around.get(k, (0, 0))[0] for k in range(value.rank)]
    after = [around.get(k, (0, 0))[1] for k in range(value.rank)]
    made = value
    for k, ends in around.items():
        made = made.sized(k, lambda size, e=ends: size + sum(e))  # type: ignore[misc]
    if mode == "constant" and m.opset >= 11 and m.chance(0.4):
        inputs = [value.name, m.ints([*before, *after]), m.constant(m.pick((0.0, 0.5)))]
        m.put(made, m.node("Pad", inputs, mode=mode))
    else:
        m.put(made, m.with_ints("Pad", value.name, 11, pads=[*before, *after], mode=mode))


def concat(m: Maker) -> None:
    value = m.live()
    axis = value.axis if m.chance(0.75) else m.upto(value.rank - 1)

    def fits(other: Live) -> bool:
        same = other.rank == value.rank and other.axis == value.axis
        rest = [k for k in range(value.rank) if k != axis]
        return same and all(s[k] == o[k] for k in rest
                            for s, o in zip(value.shapes, other.shapes, strict=True))  # fmt: skip

    parts = [value, *(m.live(fits) for _ in range(m.upto(2)))]
    m.rng.shuffle(parts)
    names = [part.name for part in parts]
    sizes = [sum(part.shapes[k][axis] for part in parts) for k in (0, 1)]
    if m.chance(0.2) and all(value.known(k) for k in range(value.rank)) and value.known(axis):
        shape = [1 if k == axis else size for k, size in enumerate(value.shapes[0])]
        names.insert(m.upto(len(names), 0), m.constant(m.rng.normal(size=shape)))
        sizes = [size + 1 for size in sizes]
    shapes = [(*s[:axis], n, *s[axis + 1 :]) for s, n in zip(value.shapes, sizes, strict=True)]
    if axis == value.axis and sizes[0] > 12:
        raise Impossible
    written = axis - value.rank if m.chance(0.3) and m.opset >= 11 else axis
    made = replace(value, shapes=(shapes[0], shapes[1]))
    m.put(made, m.node("Concat", names, axis=written))


def split(m: Maker) -> None:
    value = m.live(lambda v: v.channels > 1)
    first = m.upto(value.channels - 1)
    parts = [first, value.channels - first]
    even = value.channels % 2 == 0 and m.chance()
    if even:
        parts = [value.channels // 2] * 2
    attributes: dict[str, Any] = {"axis": value.axis}
    if even and m.opset >= 18:
        names = m.node("Split", [value.name], 2, **attributes, num_outputs=2)
    elif even:
        names = m.node("Split", [value.name], 2, **attributes)
    else:
        names = m.with_ints("Split", value.name, 13, 2, split=parts, **attributes)
    for name, size in zip(names, parts, strict=True):
        m.put(value.sized(value.axis, lambda _, size=size: size), name)  # type: ignore[misc]


def piece_of(m: Maker) -> None:
    """Slice: some channels, or some of another axis, in steps, backwards."""
    value = m.live(lambda v: v.rank > 1)
    axis = value.axis if m.chance(0.7) else m.upto(value.rank - 1)
    start, end, step = m.pick(((0, 2, 1), (1, 2**31, 1), (0, 2**31, 2), (-1, -(2**31), -1),
                               (-2, 2**31, 1), (0, -1, 1)))  # fmt: skip
    made = value.sized(axis, lambda size: len(range(size)[slice(start, end, step)]))
    if m.opset < 10 and step != 1:
        raise Impossible
    lists = {"starts": [start], "ends": [end], "axes": [axis]}
    if step != 1:
        lists["steps"] = [step]
    if m.opset < 10:
        attributes: dict[str, Any] = {"starts": [start], "ends": [end], "axes": [axis]}
        m.put(made, m.node("Slice", [value.name], **attributes))
    else:
        m.put(made, m.with_ints("Slice", value.name, 10, **lists))


def gather(m: Maker) -> None:
    value = m.live()
    size = value.channels
    low = -size if m.opset >= 11 else 0
    indices = m.rng.integers(low, size, m.upto(6))
    if m.chance(0.4):
        indices = m.rng.permutation(size)
    if m.chance(0.2) and value.rank < 4:
        indices = m.rng.integers(0, size, (2, 2))
        made = [(*s[: value.axis], 2, 2, *s[value.axis + 1 :]) for s in value.shapes]
        result = Live("", (made[0], made[1]), value.axis if value.axis == 1 else value.axis + 1)
    else:
        result = value.sized(value.axis, lambda _: len(indices))
    if result.axis not in (1, 2):
        raise Impossible
    m.put(result, m.node("Gather", [value.name, m.ints(indices)], axis=value.axis))


def shuffle(m: Maker) -> None:
    value = m.live(lambda v: is_image(v) and v.channels % 2 == 0)
    if not all(value.known(k) for k in value.spatial):
        raise Impossible
    groups, sizes = 2, list(value.shapes[0][2:])
    wide = [0, groups, value.channels // groups, *sizes]
    name = m.node("Reshape", [value.name, m.ints(wide)])
    rest = range(3, 3 + len(sizes))
    if m.chance(0.4):
        name = m.node(
            "Mul", [name, m.constant(m.scales(groups).reshape(groups, *[1] * (len(sizes) + 1)))]
        )
    name = m.node("Transpose", [name], perm=[0, 2, 1, *rest])
    m.put(value, m.node("Reshape", [name, m.ints([0, -1, *sizes])]))


def blocks(m: Maker) -> None:
    if m.chance():
        value = m.live(lambda v: is_plane(v) and v.channels % 4 == 0)
        mode: dict[str, Any] = {"mode": m.pick(("DCR", "CRD"))} if m.opset >= 11 else {}
        made = value.sized(1, lambda n: n // 4).sized(2, lambda n: 2 * n).sized(3, lambda n: 2 * n)
        m.put(made, m.node("DepthToSpace", [value.name], blocksize=2, **mode))
        return
    value = m.live(lambda v: is_plane(v) and v.channels <= 3)
    if any(shape[k] % 2 for shape in value.shapes for k in (2, 3)):
        raise Impossible
    made = value.sized(1, lambda n: n * 4).sized(2, lambda n: n // 2).sized(3, lambda n: n // 2)
    m.put(made, m.node("SpaceToDepth", [value.name], blocksize=2))


def to_tokens(m: Maker) -> None:
    value = m.live(is_image)
    size = value.channels
    area = [int(np.prod(shape[2:])) for shape in value.shapes]
    if m.chance(0.3):
        sizes = (
            m.node("Slice", [m.node("Shape", [value.name]), *map(m.ints, ([0], [2]))])
            if m.opset >= 10
            else m.node("Slice", [m.node("Shape", [value.name])], starts=[0], ends=[2])
        )
        target = m.node("Concat", [sizes, m.ints([-1])], axis=0)
    else:
        target = m.ints(m.pick(([0, size, -1], [0, 0, -1])))
    name = m.node("Reshape", [value.name, target])
    if value.rank == 3:
        name = value.name
    name = m.node("Transpose", [name], perm=[0, 2, 1])
    shapes = [(s[0], a, size) for s, a in zip(value.shapes, area, strict=True)]
    m.put(Live(name, (shapes[0], shapes[1]), 2))


def to_image(m: Maker) -> None:
    value = m.live(is_tokens)
    name = m.node("Transpose", [value.name], perm=[0, 2, 1])
    made: list[Shape] = [(s[0], s[2], s[1]) for s in value.shapes]
    if m.chance() and value.known(1):
        tokens = value.shapes[0][1]
        sizes = [2, tokens // 2] if tokens % 2 == 0 else [1, tokens]
        name = m.node("Reshape", [name, m.ints([0, 0, *sizes])])
        made = [(*s[:2], *sizes) for s in made]
    m.put(Live(name, (made[0], made[1]), 1))


def to_flat(m: Maker) -> None:
    """Flatten or Reshape to vectors, each channel many times, or each token a vector."""
    value = m.live(lambda v: v.rank > 2 and all(v.known(k) for k in range(1, v.rank)))
    shapes = value.shapes
    size = int(np.prod(shapes[0][1:]))
    if is_tokens(value) and m.chance(0.7):
        name = m.node("Reshape", [value.name, m.ints([-1, value.channels])])
        made = [(s[0] * s[1], s[2]) for s in shapes]
        vectors = m.put(Live(name, (made[0], made[1]), 1))
        if m.chance():
            size = m.upto(8)
            name = m.node("Gemm", [vectors.name, m.weight(value.channels, size), m.constant(0.5)])
            name = m.node("Reshape", [name, m.ints([-1, shapes[0][1], size])])
            m.put(value.sized(2, lambda _: size), name)
        return
    if size > 64:
        raise Impossible
    flat = m.chance()
    name = (
        m.node("Flatten", [value.name])
        if flat
        else m.node("Reshape", [value.name, m.ints([0, -1])])
    )
    m.put(Live(name, ((shapes[0][0], size), (shapes[1][0], size)), 1))


def ones(m: Maker) -> None:
    """Squeeze what has size 1, Unsqueeze at the end."""
    thin = [
        v for v in m.pool if v.rank > 2 and v.axis == 1 and v.shapes[0][-1] == v.shapes[1][-1] == 1
    ]
    if thin and m.chance(0.7):
        value = thin[-1]
        name = m.with_ints("Squeeze", value.name, 13, axes=[value.rank - 1])
        m.put(value.without([value.rank - 1], keep=False), name)
        return
    value = m.live(lambda v: v.axis == 1 and v.rank < 4)
    name = m.with_ints("Unsqueeze", value.name, 13, axes=[value.rank])
    m.put(Live(name, ((*value.shapes[0], 1), (*value.shapes[1], 1)), 1))


def repeated(m: Maker) -> None:
    if m.chance():
        value = m.live(lambda v: v.rank > 1 and any(v.shapes[0][k] == 1 for k in range(1, v.rank)))
        axis = m.pick([k for k in range(1, value.rank) if value.shapes[0][k] == 1])
        if not value.known(axis):
            raise Impossible
        wanted = [3 if k == axis else 1 for k in range(value.rank)]
        m.put(value.sized(axis, lambda _: 3), m.node("Expand", [value.name, m.ints(wanted)]))
        return
    value = m.live(lambda v: v.rank > 2)
    axis = value.axis if m.chance(0.4) else value.rank - 1
    if value.shapes[0][axis] > 4:
        raise Impossible
    times = [2 if k == axis else 1 for k in range(value.rank)]
    m.put(value.sized(axis, lambda n: 2 * n), m.node("Tile", [value.name, m.ints(times)]))


def entrance(m: Maker) -> None:
    if len(m.inputs) > 2:
        raise Impossible
    m.enter()


PIECES: Mapping[Piece, float] = {
    conv: 12, conv_transpose: 3, gemm: 4, matmul: 6, matmul_left: 1, batched_weight: 0.5,
    batch_norm: 14, affine: 12, off_axis: 1, negated: 1, enlarging: 0.5,
    activation: 5, renaming: 2, opaque: 1, gelu: 0.7, silu: 0.7, hard_swish: 0.5,
    residual: 4, residual_conv: 3, extreme: 1, where: 1, product: 1.5, quotient: 0.7,
    squeeze_excite: 1, attention: 1, captured: 0.5, norm: 2,
    pool: 2, global_pool: 1, reduction: 2, cumulated: 0.5, triangle: 0.5, resize: 1, sampled: 0.7,
    pad: 1.5, concat: 3, split: 2, piece_of: 1.5, gather: 1, shuffle: 1, blocks: 1.5,
    to_tokens: 2, to_image: 1.5, to_flat: 1.5, ones: 1, repeated: 1, entrance: 0.5,
}  # fmt: skip
