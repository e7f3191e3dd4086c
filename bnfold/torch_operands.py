"""Operations of several tensors, element by element, which may be repeated along axes.

maximum minimum    order is kept: positive scale, equal shift
add sub            equal scales, one equation between the shifts
mul div            linear in one operand, the other one in true units
where lerp         either of two, or a mean of both: equal units
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bnfold.channel_graph import Operator, ShiftRule, Sign
from bnfold.index_maps import broadcast
from bnfold.torch_products import is_live, made, multiplied
from bnfold.torch_rules import Asked, Links, Rule, UnstatedError, Way


def takes(asked: Asked, *names: str) -> None:
    """Refuse what goes by the name of an operation of ATen, and has other arguments."""
    if any(asked.call[name] is None for name in names):
        raise UnstatedError


def _ways(asked: Asked, positions: Sequence[int]) -> list[Way]:
    return [Way(k, _spread(asked, k)) for k in positions]


def _spread(asked: Asked, position: int) -> Links | None:
    """How the operand ``position`` lies in the output; None: they have one shape."""
    if _keeps_shape(asked, position):
        return None
    shape, result = asked.shape(position), made(asked)
    return None if shape == result and None not in shape else broadcast(shape, result)


def _keeps_shape(asked: Asked, position: int) -> bool:
    """Whether all other operands are constants of one element."""
    own = asked.facts.shape(asked.value(position))
    rank = 0 if own is None else len(own)
    others = [k for k in range(len(asked.sources)) if k != position]
    return all(_is_single(asked, k) and len(asked.shape(k)) <= rank for k in others)


def _is_single(asked: Asked, position: int) -> bool:
    return asked.is_constant(position) and all(dim == 1 for dim in asked.shape(position))


def _taken(asked: Asked, positions: Sequence[int]) -> tuple[list[int], bool]:
    """The operands that are activations, and whether there are others, which have to be 0."""
    live = [k for k in positions if not asked.is_constant(k)]
    rest = [k for k in positions if k not in live]
    if not live or any(asked.array(k).any() for k in rest):
        raise UnstatedError
    return live, bool(rest)


def extreme(asked: Asked) -> Operator:
    """The larger or the smaller of two."""
    takes(asked, "input", "other")
    live, with_zero = _taken(asked, (0, 1))
    shift = ShiftRule.ZERO if with_zero else ShiftRule.EQUAL
    return asked.tie(Sign.POSITIVE, shift, *_ways(asked, live))


def _where(asked: Asked) -> Operator:
    takes(asked, "condition", "input", "other")
    live, with_zero = _taken(asked, (1, 2))
    shift = ShiftRule.ZERO if with_zero else ShiftRule.EQUAL
    return asked.tie(Sign.ANY, shift, *_ways(asked, live))


def _masked_fill(asked: Asked) -> Operator:
    takes(asked, "input", "mask")
    value = asked.call["value"]
    if not asked.facts.constants.is_constant(value) or asked.facts.constants.float64(value).any():
        raise UnstatedError
    return asked.tie(Sign.ANY, ShiftRule.ZERO, *_ways(asked, [0]))


def _lerp(asked: Asked) -> Operator:
    takes(asked, "input", "end")
    return asked.tie(Sign.ANY, ShiftRule.EQUAL, *_ways(asked, [0, 1]))


# ---- sums and products ----


def _sum(first: int, second: int, scaled: int) -> Rule:
    """Signs of the two operands, the one at ``scaled`` multiplied by ``alpha``."""

    def rule(asked: Asked) -> Operator:
        takes(asked, "input", "other")
        alpha = asked.argument("alpha", 1)
        if not isinstance(alpha, int | float) or alpha == 0 or not float(alpha).is_integer():
            raise UnstatedError
        signs = [first, second]
        signs[scaled] *= int(alpha)
        return asked.sum(signs, *_ways(asked, (0, 1)))

    return rule


def _negation(asked: Asked) -> Operator:
    takes(asked, "input")
    return asked.sum((-1,), Way())


def _mul(asked: Asked) -> Operator:
    """Also by what is no step, such as a constant with two axes, or a mask."""
    takes(asked, "input", "other")
    live = [is_live(asked, k) for k in (0, 1)]
    links = [_spread(asked, k) if live[k] else None for k in (0, 1)]
    return multiplied(asked, *links)


def _div(asked: Asked) -> Operator:
    takes(asked, "input", "other")
    if asked.argument("rounding_mode") is not None:
        raise UnstatedError
    return asked.tie(Sign.ANY, ShiftRule.ZERO, *_ways(asked, [0]))


_SUBTRACTION = _sum(1, -1, 1)

OPERANDS: Mapping[str, Rule] = {
    "maximum": extreme, "minimum": extreme, "fmax": extreme, "fmin": extreme,
    "where": _where, "masked_fill": _masked_fill, "lerp": _lerp,
    "add": _sum(1, 1, 1), "sub": _SUBTRACTION, "subtract": _SUBTRACTION, "rsub": _sum(-1, 1, 0),
    "neg": _negation, "negative": _negation, "mul": _mul, "multiply": _mul,
    "div": _div, "divide": _div, "true_divide": _div,
}  # fmt: skip
