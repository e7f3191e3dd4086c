"""Normalisations by statistics of the input, which have a scale and a shift of their own.

layer_norm rms_norm    over the last axis; channels on it
instance_norm          over space; channels on axis 1
group_norm             over groups; channels on axis 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bnfold.channel_graph import Bias, Norm, Weight
from bnfold.torch_constants import UncomputableError
from bnfold.torch_facts import DTYPES, Facts
from bnfold.torch_rules import Asked, Rule, UnstatedError
from bnfold.torch_weights import storage

_SEVERAL = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm"})


def _over_last_axis(asked: Asked) -> Norm:
    normalized = asked.integers("normalized_shape")
    if normalized is None or len(normalized) != 1:
        raise UnstatedError
    shape = asked.facts.shape(asked.value())
    return _norm(asked, -1 if shape is None else len(shape) - 1, normalized[0], _bias(asked))


def _by_root_mean_square(asked: Asked) -> Norm:
    normalized = asked.integers("normalized_shape")
    if normalized is None or len(normalized) != 1:
        raise UnstatedError
    shape = asked.facts.shape(asked.value())
    return _norm(asked, -1 if shape is None else len(shape) - 1, normalized[0], Bias.OPERATOR)


def _over_groups(asked: Asked) -> Norm:
    return _norm(asked, 1, _channels(asked), _bias(asked))


def _over_space(asked: Asked) -> Norm:
    if asked.argument("use_input_stats") is not True or not _has_batch(asked):
        raise UnstatedError
    return _norm(asked, 1, _channels(asked), _bias(asked))


def _has_batch(asked: Asked) -> bool:
    """A module also takes a single image, with its channels on axis 0."""
    if asked.call.module is None:
        return True
    spatial = next((int(c) for c in type(asked.call.module).__name__ if c.isdigit()), None)
    return spatial is not None and len(asked.shape()) == spatial + 2


def _channels(asked: Asked) -> int:
    """How many there are on axis 1."""
    shape = asked.facts.shape(asked.value())
    if shape is not None and len(shape) < 2:
        raise UnstatedError
    scale = asked.call["weight"]
    held = None if scale is None else asked.facts.shape(scale)
    for size in (None if shape is None else shape[1], held[0] if held else None):
        if isinstance(size, int):
            return size
    raise UnstatedError


def _bias(asked: Asked) -> Bias:
    bias = asked.call["bias"]
    known = bias is None or asked.facts.constants.is_constant(bias)
    return Bias.BUILT_IN if known else Bias.DYNAMIC


def _norm(asked: Asked, axis: int, channels: int, bias: Bias) -> Norm:
    data = asked.value()
    if data is not asked.call["input"] or asked.is_constant(0) or not asked.facts.is_float(data):
        raise UnstatedError
    made = asked.results.get(0)
    if made is None or (asked.op in _SEVERAL and made is asked.call.node):
        raise UnstatedError  # somebody takes all that it makes at once
    if any(position and node.users for position, node in asked.results.items()):
        raise UnstatedError  # its mean or its deviation is read, too
    weight = held_weight(asked.facts, asked.call["weight"], asked.readers)
    if asked.call["weight"] is None:
        # It has a place for one; until it is made nobody reads it.
        dtype = asked.facts.dtype(made) or "of an unknown type"
        weight = Weight(f"'{asked.name}'", dtype, (asked.name,))
    elif weight is not None and asked.facts.shape(asked.call["weight"]) != (channels,):
        raise UnstatedError
    return Norm(
        name=asked.name, op_type=asked.op_type, inputs=asked.inputs,
        outputs=(asked.number(made),), axis=axis, channels=channels, weight=weight, bias=bias,
    )  # fmt: skip


def held_weight(
    facts: Facts, argument: Any, readers: Callable[[Any], tuple[str, ...]], view: str = ""
) -> Weight | None:
    """A constant that the graph holds itself, as a weight; None when it is something else.

    Args:
        facts: What is known of the graph.
        argument: The weight of an operation, or None.
        readers: The operations that read the storage of a constant, by name.
        view: How the operation reads it.
    """
    constants = facts.constants
    if constants.name(argument) is None or not constants.is_constant(argument):
        return None
    dtype = facts.dtype(argument)
    try:
        tensor = constants.tensor(argument)
    except UncomputableError:
        return None
    if dtype is None or dtype not in DTYPES.values():
        return None
    place = f"{view} {tuple(tensor.shape)} {tensor.storage_offset()}".strip()
    return Weight(storage(tensor), dtype, readers(argument), tensor.nbytes, place)


NORMS: Mapping[str, Rule] = {
    "layer_norm": _over_last_axis, "native_layer_norm": _over_last_axis,
    "rms_norm": _by_root_mean_square, "_fused_rms_norm": _by_root_mean_square,
    "group_norm": _over_groups, "native_group_norm": _over_groups, "instance_norm": _over_space,
}  # fmt: skip
