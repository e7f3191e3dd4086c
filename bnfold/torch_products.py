"""Operations that multiply two activations as matrices: linear in each of the two.

matmul mm bmm mv dot            rows of the one, columns of the other
einsum                          letters of the one that are letters of the result
scaled_dot_product_attention    a weighted mean of values; by what weights is in true units

An axis that is summed over is in no link: one scale has to hold along all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from bnfold.channel_graph import Link, Operator, ShiftRule, Sign
from bnfold.index_maps import broadcast
from bnfold.torch_facts import Shape
from bnfold.torch_rules import Asked, Links, Rule, UnstatedError, Way


def is_live(asked: Asked, position: int) -> bool:
    """Whether an operand is an activation that can be in other units."""
    value = asked.value(position)
    if isinstance(value, int | float) or asked.is_constant(position):
        return False
    return asked.facts.is_tensor(value) and asked.facts.is_float(value)


def made(asked: Asked) -> Shape:
    """The shape of the result, whose rank has to be known."""
    shape = asked.made()
    if shape is None:
        raise UnstatedError
    return shape


def multiplied(asked: Asked, first: Links | None, second: Links | None) -> Operator:
    """The product of operands 0 and 1; linear in the one that is an activation if only one is."""
    live = [k for k in (0, 1) if is_live(asked, k)]
    ways = [Way(0, first), Way(1, second)]
    if len(live) == 1:
        return asked.tie(Sign.ANY, ShiftRule.ZERO, ways[live[0]])
    return asked.product(*ways)


def _matmul(asked: Asked) -> Operator:
    first, second, result = asked.shape(0), asked.shape(1), made(asked)
    if len(asked.sources) != 2 or not first or not second:
        raise UnstatedError
    rows, columns = len(first) > 1, len(second) > 1
    batch = result[: len(result) - rows - columns]
    if len(batch) != max(len(first), len(second), 2) - 2:
        raise UnstatedError
    left, right = broadcast(first[:-2], batch), broadcast(second[:-2], batch)
    row = Link((len(first) - 2,), (len(batch),))
    column = Link((len(second) - 1,), (len(batch) + rows,))
    return multiplied(asked, (*left, row) if rows else left, (*right, column) if columns else right)


# ---- attention ----


def _attention(asked: Asked) -> Operator:
    if not asked.results.get(0) or asked.argument("enable_gqa", False):
        raise UnstatedError  # several heads share one value
    if asked.argument("dropout_p", 0.0) != 0:
        raise UnstatedError
    if len(asked.sources) < 3:
        raise UnstatedError
    shape, result = asked.shape(2), made(asked)
    if len(shape) < 2 or len(shape) > len(result):
        raise UnstatedError
    batch = broadcast(shape[:-2], result[:-2])
    channels = Link((len(shape) - 1,), (len(result) - 1,))
    # A row that a mask leaves nothing of is 0, where weights do not sum to one.
    shift = ShiftRule.EQUAL if asked.call["attn_mask"] is None else ShiftRule.ZERO
    return asked.tie(Sign.ANY, shift, Way(2, (*batch, channels)))


# ---- einsum ----


def _einsum(asked: Asked) -> Operator:
    equation = asked.argument("equation")
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise UnstatedError
    before, after = equation.replace(" ", "").split("->")
    terms = before.split(",")
    if len(terms) != len(asked.sources) or len(terms) > 2:
        raise UnstatedError
    links = [_by_letter(asked, k, term, after) for k, term in enumerate(terms)]
    if len(terms) == 2:
        return multiplied(asked, links[0], links[1])
    summed = set(before) - set(after)
    shift = ShiftRule.ZERO if summed else ShiftRule.EQUAL
    return asked.tie(Sign.ANY, shift, Way(0, links[0]))


def _by_letter(asked: Asked, position: int, term: str, after: str) -> Links:
    shape, result = asked.shape(position), made(asked)
    if len(set(term)) < len(term) or len(term) != len(shape) or len(after) != len(result):
        raise UnstatedError  # a diagonal
    pairs = [(k, after.index(letter)) for k, letter in enumerate(term) if letter in after]
    return tuple(Link((a,), (b,)) for a, b in pairs if shape[a] == result[b] is not None)


PRODUCTS: Mapping[str, Rule] = {
    "matmul": _matmul, "mm": _matmul, "bmm": _matmul, "mv": _matmul, "dot": _matmul,
    "einsum": _einsum, "scaled_dot_product_attention": _attention,
}  # fmt: skip
