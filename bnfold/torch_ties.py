"""The operator table of torch: which units each operation can live with.

    clone dropout to    any scale, any shift
    relu and its kin    f(s x) = s f(x) for s > 0: positive scale, no shift
    zeros_like          reads nothing but shape and type

Operations that take several tensors, pool, move elements about, multiply matrices or normalise have
rules of their own, in ``torch_operands``, ``torch_pooling``, ``torch_moves``, ``torch_parts``,
``torch_products`` and ``torch_norms``; an operation that no rule can state counts as unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from bnfold.channel_graph import Opaque, Operator, ShiftRule, Sign
from bnfold.torch_calls import Call
from bnfold.torch_constants import UncomputableError
from bnfold.torch_facts import DTYPES, Facts
from bnfold.torch_moves import MOVES
from bnfold.torch_norms import NORMS
from bnfold.torch_operands import OPERANDS, extreme, takes
from bnfold.torch_parts import PARTS
from bnfold.torch_pooling import POOLING
from bnfold.torch_products import PRODUCTS
from bnfold.torch_rules import Asked, Rule, UnstatedError, Way


def find_tie(
    facts: Facts,
    call: Call,
    number: Callable[[fx.Node], int],
    readers: Callable[[Any], tuple[str, ...]],
    results: Mapping[int, fx.Node],
) -> Operator | None:
    """State ``call`` as a Tie, Sum, Product or Norm; None: all around it is in true units.

    What only asks for the shape and the type of a tensor is Opaque, and reads nothing.

    Args:
        facts: What is known of the graph.
        call: An operation that is neither linear nor an affine step.
        number: The number of an activation.
        readers: The operations that read the storage of a constant, by name.
        results: The nodes of its outputs, by position.
    """
    rule = TABLE.get(call.op)
    if rule is None:
        return None
    try:
        return rule(Asked(facts, call, number, readers, results))
    except (UnstatedError, UncomputableError):
        return None


# ---- of one input, element by element ----


def _alike(sign: Sign, shift: ShiftRule) -> Rule:
    def rule(asked: Asked) -> Operator:
        takes(asked, "input")
        return asked.tie(sign, shift, Way())

    return rule


def _dropout(asked: Asked) -> Operator:
    takes(asked, "input")
    if asked.op.startswith("native") and asked.results.get(0) is asked.call.node:
        raise UnstatedError  # somebody takes its result and its mask at once
    if not (_is_off(asked) or asked.argument("p") == 0):
        raise UnstatedError
    tie = asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())
    return replace(tie, outputs=tie.outputs[:1], routes=())  # nobody reads the mask


def _is_off(asked: Asked) -> bool:
    """Whether an operation that draws random numbers in training is in evaluation mode."""
    names = [name for name in ("train", "training") if name in asked.call.arguments]
    return bool(names) and all(asked.argument(name) is False for name in names)


def _random_slope(asked: Asked) -> Operator:
    takes(asked, "input")
    if not _is_off(asked):
        raise UnstatedError
    return asked.tie(Sign.POSITIVE, ShiftRule.ZERO, Way())


def _cast(asked: Asked) -> Operator:
    """The result is of a float type: known to be, or because nothing asks for another one."""
    if asked.value() is not next(iter(asked.call.arguments.values())):
        raise UnstatedError
    if asked.facts.dtype(asked.results.get(0)) is None and not all(
        map(_is_no_other_type, list(asked.call.arguments.values())[1:])
    ):
        raise UnstatedError
    tie = asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())
    # Of a second tensor only the type is read.
    return replace(tie, inputs=tie.inputs[:1], routes=())


def _is_no_other_type(value: Any) -> bool:
    if isinstance(value, torch.dtype):
        return value in DTYPES
    if isinstance(value, str):
        return not value.startswith("torch.")  # where it is to stand
    return not isinstance(value, fx.Node | Tensor)


def _attribute(asked: Asked) -> Operator:
    """What a traced graph takes of a tensor by ``getattr``."""
    if asked.call["1"] != "data":
        raise UnstatedError
    return asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())


def _like(asked: Asked) -> Operator:
    """A new tensor; of the one that is given only shape and type are read."""
    return Opaque(name=asked.name, op_type=asked.op_type, inputs=(), outputs=asked.outputs)


# ---- rectifiers ----


def _threshold(asked: Asked) -> Operator:
    takes(asked, "input")
    if (asked.argument("threshold"), asked.argument("value")) != (0, 0):
        raise UnstatedError
    return asked.tie(Sign.POSITIVE, ShiftRule.ZERO, Way())


def _clamp(low: str, high: str) -> Rule:
    def rule(asked: Asked) -> Operator:
        takes(asked, "input")
        bounds = _bound(asked, low, -inf), _bound(asked, high, inf)
        if bounds == (-inf, inf):
            return asked.tie(Sign.ANY, ShiftRule.EQUAL, Way())
        if bounds[0] not in (0, -inf) or bounds[1] not in (0, inf):
            raise UnstatedError
        return asked.tie(Sign.POSITIVE, ShiftRule.ZERO, Way())

    return rule


def _bound(asked: Asked, name: str, none: float) -> float:
    given = asked.call[name]
    if given is None:
        return none
    if not asked.facts.constants.is_constant(given):
        raise UnstatedError
    value = asked.facts.constants.float64(given)
    if value.ndim:  # it may enlarge what it bounds
        raise UnstatedError
    beyond = abs(value) >= _largest(asked) and value * none > 0
    return none if beyond else float(value)


def _largest(asked: Asked) -> float:
    """The largest number of the type: a bound there changes nothing."""
    dtype = asked.facts.dtype(asked.value())
    named = {name: own for own, name in DTYPES.items()}
    return torch.finfo(named[dtype]).max if dtype in named else inf


def _of_two(name: str) -> Rule:
    """One name stands for the larger of two and for the largest along an axis."""
    along = POOLING[name]
    return lambda asked: (extreme if asked.call["other"] is not None else along)(asked)


_IDENTITY = _alike(Sign.ANY, ShiftRule.EQUAL)
_RECTIFIER = _alike(Sign.POSITIVE, ShiftRule.ZERO)
_MASK = _alike(Sign.ANY, ShiftRule.ZERO)

_CASTS = (
    "to", "_to_copy", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda",
    "clone", "contiguous",
)  # fmt: skip
_COPIES = ("alias", "detach", "lift_fresh", "lift_fresh_copy", "positive", "real", "requires_grad")
_DROPOUTS = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout",
    "feature_alpha_dropout", "native_dropout",
)  # fmt: skip
_LIKE = (
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_full", "new_empty",
)  # fmt: skip

TABLE: Mapping[str, Rule] = {
    **dict.fromkeys(_COPIES, _IDENTITY), **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_DROPOUTS, _dropout), **dict.fromkeys(_LIKE, _like), "getattr": _attribute,
    "relu": _RECTIFIER, "leaky_relu": _RECTIFIER, "abs": _RECTIFIER, "absolute": _RECTIFIER,
    "prelu": _RECTIFIER, "_prelu_kernel": _RECTIFIER, "rrelu": _random_slope,
    "threshold": _threshold, "_threshold": _threshold,
    "clamp": _clamp("min", "max"), "clip": _clamp("min", "max"),
    "clamp_min": _clamp("min", ""), "clamp_max": _clamp("", "max"),
    "hardtanh": _clamp("min_val", "max_val"), "tril": _MASK, "triu": _MASK,
    **OPERANDS, **POOLING, **MOVES, **PARTS, **PRODUCTS, **NORMS,
    "max": _of_two("max"), "min": _of_two("min"),
}  # fmt: skip
