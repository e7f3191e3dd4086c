"""What an ONNX operator holds once it took over its neighbours' maps: arrays, no edits.

weight   W' = a_out W a_in                          in the type in which W is stored
bias     c' = a_out (beta c + alpha W b_in) + b_out in the type of c, or of W when there is none
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bnfold.affine import (
    F64,
    Layout,
    cast_once,
    fold_weight,
    in_channels,
    out_channels,
    range_fault,
    shift_through,
    vector_fault,
)
from bnfold.onnx_constants import Array
from bnfold.onnx_evaluate import UncomputableError
from bnfold.onnx_facts import Facts, input_at
from bnfold.onnx_linear import LinearSite
from bnfold.planning import Absorption, Reason


class FoldRefusedError(Exception):
    """A fold turned out, when it was computed, to be one that must not be made.

    Args:
        operator: The index of the operator in the channel graph.
        reason: ``Reason.RANGE`` when a folded tensor leaves the range of its type,
            ``Reason.WEIGHT_NOT_CONSTANT`` when a constant can't be computed.
        detail: The channel, and what happened there.
    """

    def __init__(self, operator: int, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.operator, self.reason, self.detail = operator, reason, detail


def weight_changes(taken: Absorption) -> bool:
    """Whether the weight is another one after the fold."""
    return not all(m is None or m.is_shifting for m in (taken.input, taken.output))


def folded_weight(
    before: Array, dtype: ir.DataType, index: int, layout: Layout, taken: Absorption
) -> Array:
    """The weight of linear operator ``index`` after the fold, in the type it is stored in.

    Raises:
        FoldRefusedError: It does not fit its type.
    """
    a_out = None if taken.output is None else taken.output.scale
    a_in = None if taken.input is None else taken.input.scale
    after = fold_weight(before, layout, output_scale=a_out, input_scale=a_in)
    if after.dtype != dtype.numpy():
        after = cast_once(after.astype(np.float64), dtype.numpy())
    fault = range_fault(before, after, layout, zeroed=_zeroed(before, layout, a_out, a_in))
    if fault is not None:
        raise FoldRefusedError(index, Reason.RANGE, f"{fault.what} on channel {fault.channel}")
    return after


def _zeroed(
    before: Array, layout: Layout, a_out: F64 | None, a_in: F64 | None
) -> NDArray[np.bool_] | None:
    """The output channels that a scale of zero empties on purpose."""
    channels = out_channels(before.shape, layout)
    zeroed = np.zeros(channels, dtype=bool)
    if a_out is not None:
        zeroed |= a_out == 0
    if a_in is not None:
        live = np.broadcast_to(a_in != 0, (max(a_in.size, layout.groups),))
        empty = ~live.reshape(layout.groups, -1).any(axis=1)
        zeroed |= np.repeat(empty, channels // layout.groups)
    return zeroed if zeroed.any() else None


def folded_bias(facts: Facts, index: int, site: LinearSite, taken: Absorption) -> Array | None:
    """The bias of linear operator ``index`` after the fold; None when it needs none.

    Shape (M,), or (1, M) and (rows, M) where the given bias has rows of its own.

    Raises:
        FoldRefusedError: It does not fit its type.
    """
    try:
        return _folded_bias(facts, index, site, taken)
    except UncomputableError as error:
        raise FoldRefusedError(index, Reason.WEIGHT_NOT_CONSTANT, str(error)) from error


def _folded_bias(facts: Facts, index: int, site: LinearSite, taken: Absorption) -> Array | None:
    given = bias_value(facts, site)
    if given is None and all(m is None or m.is_scaling for m in (taken.input, taken.output)):
        return None
    weight = site.node.inputs[site.weight_input]
    assert weight is not None
    channels = out_channels(facts.constants.shape(weight), site.layout)
    before = _given_bias(facts, site, given, channels)
    wide = before
    if taken.input is not None and not taken.input.is_scaling:
        shift = taken.input.expand(in_channels(facts.constants.shape(weight), site.layout)).shift
        wide = wide + site.alpha * shift_through(facts.constants.array(weight), site.layout, shift)
    if taken.output is not None:
        wide = wide * taken.output.scale + taken.output.shift
    source = given if given is not None else weight
    dtype = facts.constants.dtype(source)
    assert dtype is not None
    after = cast_once(wide, dtype.numpy())
    fault = vector_fault(wide, after)
    if fault is not None:
        raise FoldRefusedError(
            index, Reason.RANGE, f"the bias {fault.what} on channel {fault.channel}"
        )
    return after


def _given_bias(facts: Facts, site: LinearSite, given: ir.Value | None, channels: int) -> F64:
    if given is None or site.beta == 0:
        return np.zeros(channels)
    stored = site.beta * facts.constants.float64(given)
    if site.add is None and stored.ndim == 2 and stored.shape[0] > 1:
        return np.broadcast_to(stored, (stored.shape[0], channels))
    return np.broadcast_to(stored.ravel(), (channels,))


def bias_value(facts: Facts, site: LinearSite) -> ir.Value | None:
    """The constant that is the bias of ``site`` now."""
    if site.add is not None:
        return next(v for v in site.add.inputs if facts.constants.is_constant(v))
    return input_at(site.node, site.bias_input)
