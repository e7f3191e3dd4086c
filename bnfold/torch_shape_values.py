"""Shapes of what is computed element by element, multiplied as matrices or reduced; and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from torch import nn

from bnfold.channel_graph import Dim
from bnfold.torch_shape_asked import Array, Asked, Known, Number, Rule
from bnfold.torch_sizes import added, broadcast, product, quotient

# ---- element by element ----


def same(asked: Asked) -> Known:
    """The shape of the first operand."""
    return asked.same()


def pointwise(asked: Asked) -> Known:
    """All tensors broadcast to one shape; a tensor that is changed in place keeps its own."""
    if asked.call.mutates == "input":
        return asked.same()
    tensors = asked.tensors()
    known = [asked.state.known(tensor) for tensor in tensors]
    shapes = [value.shape for value in known if isinstance(value, Array)]
    numbers = [value for value in known if isinstance(value, Number | int | str)]
    if shapes:
        return Array(broadcast(shapes)) if len(shapes) + len(numbers) == len(known) else None
    made = asked.state.asked(asked.call.node)
    if len(tensors) == 1 and made is not None:
        asked.state.prove(tensors[0], made.shape)
    return None


def _where(asked: Asked) -> Known:
    return pointwise(asked) if len(asked.call.arguments) > 1 else None


# ---- sizes that are computed ----


def arithmetic(asked: Asked) -> Known:
    """An operation on tensors, on lists of sizes, or on sizes."""
    found = pointwise(asked)
    if found is not None:
        return found
    known = [asked.state.known(value) for value in islice(asked.call.arguments.values(), 2)]
    op = asked.call.op
    if isinstance(known[0], tuple) or isinstance(known[-1], tuple):
        return _of_lists(op, known)
    if not all(isinstance(value, int | str | Number) for value in known):
        return None
    sizes = [v for v in known if isinstance(v, str) or (isinstance(v, int) and v >= 0)]
    if len(known) == 2 and all(isinstance(value, int) for value in known):
        return _of_numbers(op, *(v for v in known if isinstance(v, int)))
    return _of_sizes(asked, op, *sizes) if len(sizes) == 2 else Number()


def _of_lists(op: str, known: list[Known]) -> Known:
    one, other = known[0], known[-1]
    if op == "add" and isinstance(one, tuple) and isinstance(other, tuple):
        return one + other
    if op == "mul" and isinstance(one, tuple) and isinstance(other, int):
        return one * other
    if op == "mul" and isinstance(one, int) and isinstance(other, tuple):
        return other * one
    return None


def _of_numbers(op: str, one: int, other: int) -> Known:
    if op == "add":
        return one + other
    if op == "sub":
        return one - other
    if op == "mul":
        return one * other
    if op in _WHOLE and other:
        return one // other
    return one % other if op == "mod" and other else Number()


def _of_sizes(asked: Asked, op: str, one: Dim, other: Dim) -> Known:
    """Neither is negative; what is no product of known sizes gets a name of its own."""
    if op == "mul":
        return product((one, other))
    if op == "add":
        return added(one, other) or asked.state.symbol(asked.call.node)
    if op in _WHOLE and other != 0:
        exact = quotient(one, other)
        return asked.state.symbol(asked.call.node) if exact is None else exact
    return asked.state.symbol(asked.call.node) if op == "mod" else Number()


_WHOLE = ("floordiv", "floor_divide")


# ---- products ----


def _matmul(asked: Asked) -> Known:
    one, other = asked.shape(), asked.shape("other")
    if not one or not other or len(one) < 2:
        return None
    asked.state.equate(one[-1:], other[-2:][:1])
    if len(other) == 1:
        return Array(one[:-1])
    return Array((*broadcast((one[:-2], other[:-2])), one[-2], other[-1]))


def _of_rank(rank: int, first: str, second: str) -> Rule:
    """A product of matrices that takes exactly this rank."""

    def rule(asked: Asked) -> Known:
        one, other = (asked.prove((None,) * rank, name) for name in (first, second))
        if not one or not other or not len(one) == len(other) == rank:
            return None
        asked.state.equate((*one[:-2], one[-1]), other[:-1])
        return Array((*one[:-1], other[-1]))

    return rule


def _attention(asked: Asked) -> Known:
    query, value = asked.shape("query"), asked.shape("value")
    if not query or not value or not 2 <= len(value) == len(query):
        return None
    key = asked.shape("key")
    alike = key is not None and query[:-2] == key[:-2] == value[:-2]
    lead = query[:-2] if alike else (None,) * (len(query) - 2)
    return Array((*lead, query[-2], value[-1]))


def _heads(asked: Asked) -> Known:
    """A layer of attention, and its weights."""
    found = asked.same()
    return None if found is None else (found, None)


def _einsum(asked: Asked) -> Known:
    equation, *others = asked.call.arguments.values()
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    given, made = equation.replace(" ", "").split("->")
    letters = given.split(",")
    operands = others[0] if others and isinstance(others[0], list | tuple) else others
    sizes: dict[str, list[Dim]] = {}
    for word, operand in zip(letters, islice(operands, len(letters)), strict=False):
        asked.state.prove(operand, (None,) * len(word))
        found = asked.state.known(operand)
        if not isinstance(found, Array) or len(found.shape) != len(word):
            return None
        for letter, size in zip(word, found.shape, strict=True):
            sizes.setdefault(letter, []).append(size)
    if not set(made) <= sizes.keys():
        return None
    return Array(tuple(broadcast([(size,) for size in sizes[letter]])[0] for letter in made))


# ---- reductions ----


def _reduced(asked: Asked) -> Known:
    keep = asked.call["keepdim"] or False
    if "input" not in asked.call.arguments or not isinstance(keep, bool):
        return None
    data, given = asked.shape(), asked.call["dim"]
    if given is None or given in ([], ()):
        return Array(()) if not keep else None if data is None else Array((1,) * len(data))
    axes = None if data is None else asked.axes("dim", len(data))
    if data is None or axes is None:
        return None
    shape = (1 if k in axes else size for k, size in enumerate(data) if keep or k not in axes)
    return Array(tuple(shape))


def _extreme(asked: Asked) -> Known:
    """A maximum or its kin: of all, along an axis with its position, or of two tensors."""
    if "other" in asked.call.arguments:
        return pointwise(asked)
    found = _reduced(asked)
    return found if asked.call["dim"] is None or found is None else (found, found)


def _mean_and_spread(asked: Asked) -> Known:
    found = _reduced(asked)
    return None if found is None else (found, found)


def _sorted(asked: Asked) -> Known:
    found = asked.same()
    return None if found is None else (found, found)


def _topk(asked: Asked) -> Known:
    data = asked.shape()
    axis = None if data is None else asked.axis("dim", len(data))
    if data is None or axis is None:
        return None
    found = Array((*data[:axis], asked.size("k"), *data[axis + 1 :]))
    return (found, found)


def _halved(asked: Asked) -> Known:
    data = asked.state.known(asked.data)
    dim = asked.call.module.dim if isinstance(asked.call.module, nn.GLU) else asked.call["dim"]
    if not isinstance(data, Array) or not isinstance(dim, int) or not data.shape:
        return None
    axis = dim % len(data.shape)
    shape = data.shape
    return Array((*shape[:axis], quotient(shape[axis], 2), *shape[axis + 1 :]))


_KEEP = """
    alias clone contiguous detach requires_grad to _to_copy type_as float double half bfloat16 int
    long bool cpu cuda type lift_fresh lift_fresh_copy dropout alpha_dropout
    feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d prelu softmax log_softmax
    _softmax _log_softmax softmin gumbel_softmax normalize local_response_norm instance_norm
    rms_norm cumsum cumprod flip roll tril triu rrelu bernoulli copy fill zero zeros_like
    ones_like full_like rand_like randn_like empty_like channel_shuffle scatter scatter_add
    index_put index_copy index_fill renorm nan_to_num
    GELU SiLU Sigmoid Tanh Hardswish Hardsigmoid ELU SELU CELU Mish Softplus Softsign LogSigmoid
    Softshrink Hardshrink Tanhshrink RReLU Softmax Softmax2d LogSoftmax Softmin
    LocalResponseNorm CrossMapLRN2d
"""
_POINTWISE = """
    div rsub true_divide remainder fmod maximum minimum fmax fmin eq ne lt le gt ge logical_and
    logical_or logical_not logical_xor and_ or_ bitwise_and bitwise_or bitwise_not lerp addcmul
    addcdiv atan2 hypot clamp clamp_min clamp_max clip masked_fill abs relu relu6 leaky_relu
    hardtanh silu hardswish hardsigmoid elu selu celu mish gelu sigmoid logsigmoid log_sigmoid
    softplus softsign softshrink hardshrink tanhshrink tanh threshold exp exp2 expm1 log log1p
    log2 log10 sqrt rsqrt square reciprocal sin cos tan asin acos atan sinh cosh asinh acosh
    atanh erf erfc sign floor ceil round trunc frac isnan isinf isfinite positive invert
"""
_ARITHMETIC = "add sub mul neg pow floordiv floor_divide truediv mod"
_REDUCTIONS = """
    mean sum prod amax amin logsumexp nansum nanmean var std norm linalg_vector_norm all any argmax
    argmin count_nonzero
"""

VALUES: Mapping[str, Rule] = {
    **dict.fromkeys(_KEEP.split(), same),
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(_ARITHMETIC.split(), arithmetic),
    **dict.fromkeys(_REDUCTIONS.split(), _reduced),
    **dict.fromkeys(("max", "min", "median", "nanmedian"), _extreme),
    "where": _where,
    "var_mean": _mean_and_spread, "std_mean": _mean_and_spread,
    "sort": _sorted, "topk": _topk,
    "glu": _halved, "GLU": _halved,
    "matmul": _matmul,
    "mm": _of_rank(2, "input", "mat2"), "addmm": _of_rank(2, "mat1", "mat2"),
    "bmm": _of_rank(3, "input", "mat2"), "baddbmm": _of_rank(3, "batch1", "batch2"),
    "scaled_dot_product_attention": _attention,
    "MultiheadAttention": _heads, "einsum": _einsum,
}  # fmt: skip
