"""The conditions under which a linear operator may absorb a map, one doubt per line.

    output side:  m(W x + c)  =  (a W) x + (a c + b)            m(y) = a y + b
    input side:   W m(x) + c  =  (W a) x + (c + W b)            m(x) = a x + b

The second needs the shift to reach every output alike: no zeros padded in where it is not 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnfold.affine import AffineMap
from bnfold.channel_graph import Affine, Anchor, Bias, Linear, Side, ValueId, Weight
from bnfold.passes.draft import Draft
from bnfold.passes.number_types import NUMBER_TYPES
from bnfold.planning import Absorption, Kept, Reason

_ANCHOR_REASONS = {
    Anchor.INPUT: Reason.GRAPH_BOUNDARY,
    Anchor.OUTPUT: Reason.GRAPH_BOUNDARY,
    Anchor.CAPTURED: Reason.CAPTURED,
    Anchor.HOOK: Reason.HOOK,
    Anchor.CHANGED: Reason.IN_PLACE,
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a fold was not made; ``near`` when a linear operator was there to take it."""

    reason: Reason
    witness: tuple[str, ...]
    detail: str = ""
    near: bool = True

    def kept(self, step: int) -> Kept:
        """The verdict on ``step``."""
        return Kept(step, self.reason, self.witness, self.detail)


def anchored(draft: Draft, value: ValueId) -> Refusal | None:
    """Refuse to restore the units of a value that somebody outside reads."""
    anchor = draft.anchors.get(value)
    if anchor is None:
        return None
    name = draft.values[value].name
    return Refusal(_ANCHOR_REASONS[anchor], (f"'{name}'",), f"which {anchor.value}")


def read_by_others(draft: Draft, value: ValueId, reader: int) -> Refusal | None:
    """Refuse when anybody but ``reader`` reads ``value``."""
    others = [index for index in draft.readers(value) if index != reader]
    if not others:
        return None
    return Refusal(Reason.OTHER_READER, tuple(dict.fromkeys(draft.name(i) for i in others)))


def unusable(weight: Weight | None, name: str) -> Refusal | None:
    """Refuse to change the weight of operator ``name``: none there, or not of a float type."""
    if weight is None:
        return Refusal(Reason.WEIGHT_NOT_CONSTANT, (name,))
    if weight.dtype not in NUMBER_TYPES:
        return Refusal(Reason.WEIGHT_TYPE, (name,), weight.dtype)
    return None


def shared(weight: Weight, name: str) -> Refusal:
    """Refuse to change a weight that others read besides operator ``name``."""
    others = tuple(reader for reader in weight.readers if reader != name)
    return Refusal(Reason.SHARED_WEIGHT, others or weight.readers)


def has_no_scales(name: str, sides: Side) -> Refusal:
    """Refuse to scale channels of operator ``name`` one by one along ``sides`` of its weight."""
    along = {Side.INPUT: "input", Side.OUTPUT: "output"}.get(sides, "input and output")
    detail = f"quantised, with no scale for each of its {along} channels"
    return Refusal(Reason.WEIGHT_TYPE, (name,), detail)


def scale_refusal(draft: Draft, index: int, side: Side, taken: AffineMap) -> Refusal | None:
    """Refuse scales on ``side`` that the weight has no place for beside those it took over."""
    linear = draft.operator(index)
    assert isinstance(linear, Linear)
    old = draft.absorptions.get(index, Absorption())
    asked = varying(taken, side)
    asked |= varying(old.input, Side.INPUT) | varying(old.output, Side.OUTPUT)
    if linear.weight is None or any(asked in held for held in linear.weight.varies):
        return None
    return has_no_scales(linear.name, asked)


def varying(taken: AffineMap | None, side: Side) -> Side:
    """``side`` if the scale of ``taken`` is not the same on all of its channels."""
    varies = taken is not None and bool((taken.scale != taken.scale[0]).any())
    return side if varies else Side.NONE


def weight_refusal(linear: Linear, taken: AffineMap) -> Refusal | None:
    """Refuse to change a weight that is not there, not ours alone, or not of a float type."""
    if refusal := unusable(linear.weight, linear.name):
        return refusal
    assert linear.weight is not None
    if len(linear.weight.readers) > 1 and not taken.is_shifting:
        return shared(linear.weight, linear.name)
    return None


def channel_refusal(step: Affine, taken: AffineMap, linear: Linear, side: str) -> Refusal | None:
    """Refuse unless the step's channels are the operator's channels on that side."""
    if step.axis is None:
        return None
    axis = linear.in_axis if side == "input" else linear.out_axis
    channels = linear.in_channels if side == "input" else linear.out_channels
    if step.axis != axis:
        detail = f"they lie on axis {step.axis}, its {side} channels on axis {axis}"
        return Refusal(Reason.CHANNEL_AXIS, (linear.name,), detail)
    if taken.channels not in (1, channels):
        detail = f"{taken.channels} against {channels}"
        return Refusal(Reason.CHANNEL_AXIS, (linear.name,), detail)
    return None


def output_refusal(step: Affine, taken: AffineMap, linear: Linear) -> Refusal | None:
    """Refuse, or None when ``linear`` may apply ``taken`` to its output."""
    if refusal := weight_refusal(linear, taken):
        return refusal
    if refusal := channel_refusal(step, taken, linear, "output"):
        return refusal
    if linear.bias is Bias.DYNAMIC:
        return Refusal(Reason.BIAS_NOT_CONSTANT, (linear.name,))
    if linear.bias is Bias.NOWHERE and not taken.is_scaling:
        return Refusal(Reason.EXTRA_OPERATOR, (linear.name,))
    return None


def input_refusal(step: Affine, taken: AffineMap, linear: Linear) -> Refusal | None:
    """Refuse, or None when ``linear`` may apply ``taken`` to its input."""
    if refusal := weight_refusal(linear, taken):
        return refusal
    if refusal := channel_refusal(step, taken, linear, "input"):
        return refusal
    if taken.is_scaling:
        return None
    if linear.shift_barrier:
        return Refusal(Reason.ZERO_PADDING, (linear.name,), linear.shift_barrier)
    if linear.bias is Bias.DYNAMIC:
        return Refusal(Reason.BIAS_NOT_CONSTANT, (linear.name,))
    if linear.bias is Bias.NOWHERE:
        return Refusal(Reason.EXTRA_OPERATOR, (linear.name,))
    return None


def undone(taken: AffineMap) -> AffineMap:
    """The map that undoes ``taken``; not finite where nothing does."""
    with np.errstate(all="ignore"):
        return AffineMap(1 / taken.scale, -taken.shift / taken.scale)
