"""What a linear operator holds once it took over its neighbours' maps, and when that is refused.

    weight   W' = a_out W a_in                          in the type in which W is stored
    bias     c' = a_out (beta c + alpha W b_in) + b_out in the type of c, or of W when there is none

Arrays only: which tensor they come from and where they go is a front end's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfold.affine import (
    F64,
    AffineMap,
    Layout,
    RangeGuard,
    cast_once,
    fold_weight,
    in_channels,
    out_channels,
    shift_through,
    vector_fault,
)
from bnfold.channel_graph import ChannelGraph, Leftover
from bnfold.errors import UsageError
from bnfold.layout import Array
from bnfold.passes import plan_local, plan_max, with_forms
from bnfold.planning import Absorption, Kept, Plan, Reason
from bnfold.range_guard import scale_fault

LEVELS = ("max", "local")
LEFTOVERS = ("keep", *(form.value for form in Leftover))
UNSHARE_BYTES = 64 << 20
"""How many bytes of weights ``unshare=True`` may store again."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to fold.

    Attributes:
        level: ``"max"`` solves for the units of all tensors, ``"local"`` folds between direct
            neighbours.
        trust_initializers: Whether initializers that are also graph inputs are constants.
        unshare_bytes: How many bytes of weights that several operators share may be stored again.
        leftover: How steps that stay are written: as they are (``"keep"``), or as the operators of
            a `Leftover` where that is possible.
        horizontal: Whether operators side by side become one also where that takes a copy.
    """

    level: str = "max"
    trust_initializers: bool = False
    unshare_bytes: int = 0
    leftover: str = "keep"
    horizontal: bool = False

    def __post_init__(self) -> None:
        _require("level", self.level, LEVELS)
        _require("leftover", self.leftover, LEFTOVERS)
        if self.horizontal and self.level != "max":
            met = f"at level '{self.level}' no operators become one"
            raise UsageError(met, todo="horizontal goes with level 'max'")

    @classmethod
    def of(
        cls, level: str, trust_initializers: bool, unshare: bool | int, leftover: str = "keep",
        horizontal: bool = False,
    ) -> Options:  # fmt: skip
        """The options as callers give them: True is as much as `UNSHARE_BYTES`."""
        unshare_bytes = UNSHARE_BYTES if unshare is True else int(unshare)
        return cls(level, trust_initializers, unshare_bytes, leftover, horizontal)

    def plan(self, graph: ChannelGraph, refused: Mapping[int, Kept]) -> Plan:
        """Decide every affine step of ``graph``."""
        if self.level == "local":
            plan = plan_local(graph, refused)
        else:
            plan = plan_max(
                graph, refused, unshare_bytes=self.unshare_bytes, horizontal=self.horizontal
            )
        return plan if self.leftover == "keep" else with_forms(graph, plan, Leftover(self.leftover))


def _require(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        todo = f"choose one of: {', '.join(known)}"
        raise UsageError(f"there is no {option} '{given}'", todo=todo)


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


def refusals(graph: ChannelGraph, plan: Plan, fault: FoldRefusedError) -> dict[int, Kept]:
    """The steps that must stay because of what the operator that took them over met.

    A step that stays anyway, and does not fit the form that it was to take, keeps the one it has.
    """
    if fault.operator in plan.forms:
        kept = next(kept for kept in plan.kept if kept.step == fault.operator)
        return {fault.operator: replace(kept, unchanged=True)}
    name = graph.operators[fault.operator].name
    for merge in plan.merges:
        if merge.into == fault.operator:  # what it took over besides may fit once it is alone
            return {merge.root: Kept(merge.root, fault.reason, (name,), fault.detail)}
    blamed = {fault.operator}
    for _ in plan.folds:
        more = {fold.step for fold in plan.folds if blamed.intersection(fold.into)}
        if more <= blamed:
            break
        blamed |= more
    folded = {fold.step for fold in plan.folds}
    # A shift may have come a long way; then the nearest step is dropped, and it is tried again.
    nearest = sorted(folded, key=lambda step: abs(step - fault.operator))[:1]
    steps = blamed & folded or set(nearest)
    assert steps, f"no fold is to blame for {name}: {fault.detail}"
    return {step: Kept(step, fault.reason, (name,), fault.detail) for step in steps}


def weight_changes(taken: Absorption) -> bool:
    """Whether the weight is another one after the fold."""
    return not all(m is None or m.is_shifting for m in (taken.input, taken.output))


def scales(taken: Absorption) -> tuple[F64 | None, F64 | None]:
    """What the weight is multiplied by: on the side of its output, and of its input."""
    return (
        None if taken.output is None else taken.output.scale,
        None if taken.input is None else taken.input.scale,
    )


def folded_weight(weight: Array, layout: Layout, index: int, taken: Absorption) -> Array:
    """The weight of linear operator ``index`` after the fold, in the type that it is stored in.

    Raises:
        FoldRefusedError: It does not fit its type.
    """
    a_out, a_in = scales(taken)
    after = fold_weight(weight, layout, output_scale=a_out, input_scale=a_in)
    guard = RangeGuard(weight.shape, layout, after.dtype)
    guard.see(0, weight, after)
    refuse_out_of_range(guard, weight.shape, layout, index, taken)
    return after


def refuse_out_of_range(
    guard: RangeGuard, shape: tuple[int, ...], layout: Layout, index: int, taken: Absorption
) -> None:
    """Refuse a fold by what ``guard`` saw of the weight of linear operator ``index``."""
    fault = guard.fault(_zeroed(shape, layout, *scales(taken)))
    if fault is not None:
        raise FoldRefusedError(index, Reason.RANGE, f"{fault.what} on channel {fault.channel}")


def _zeroed(
    shape: tuple[int, ...], layout: Layout, a_out: F64 | None, a_in: F64 | None
) -> NDArray[np.bool_] | None:
    """The output channels that a scale of zero empties on purpose."""
    channels = out_channels(shape, layout)
    zeroed = np.zeros(channels, dtype=bool)
    if a_out is not None:
        zeroed |= a_out == 0
    if a_in is not None:
        live = np.broadcast_to(a_in != 0, (max(a_in.size, layout.groups),))
        empty = ~live.reshape(layout.groups, -1).any(axis=1)
        zeroed |= np.repeat(empty, channels // layout.groups)
    return zeroed if zeroed.any() else None


def bias_stays_away(taken: Absorption) -> bool:
    """Whether an operator without a bias needs none after the fold either."""
    return all(m is None or m.is_scaling for m in (taken.input, taken.output))


def folded_bias(
    before: F64,
    weight: Array | None,
    layout: Layout,
    index: int,
    taken: Absorption,
    dtype: DTypeLike,
    alpha: float = 1.0,
) -> Array:
    """The bias of linear operator ``index`` after the fold.

    Args:
        before: Shape (M,), or with rows of its own (rows, M); what is added now.
        weight: Needed where a shift of the input is taken over.
        layout: Where the weight's channels are.
        index: The index of the operator in the channel graph.
        taken: What the operator takes over.
        dtype: The type that the bias is stored in.
        alpha: What the product is multiplied by.

    Raises:
        FoldRefusedError: It does not fit its type.
    """
    wide = before
    if taken.input is not None and not taken.input.is_scaling:
        assert weight is not None
        shift = taken.input.expand(in_channels(weight.shape, layout)).shift
        wide = wide + alpha * shift_through(weight, layout, shift)
    if taken.output is not None:
        wide = wide * taken.output.scale + taken.output.shift
    return checked(index, wide, dtype, "the bias ")


def checked(index: int, values: F64, dtype: DTypeLike, what: str = "") -> Array:
    """``values`` in the type that they are stored in.

    Raises:
        FoldRefusedError: They do not fit it.
    """
    result = cast_once(values, dtype)
    fault = vector_fault(values, result)
    if fault is not None:
        detail = f"{what}{fault.what} on channel {fault.channel}"
        raise FoldRefusedError(index, Reason.RANGE, detail)
    return result


def leftover_numbers(
    index: int, form: Leftover, merged: AffineMap, channels: int, dtype: DTypeLike
) -> tuple[Array | None, Array | None]:
    """What step ``index`` multiplies by and what it adds, in the type of its input.

    Args:
        index: The index of the step in the channel graph.
        form: As what it is written.
        merged: What it does, with all that it took over.
        channels: How many channels it has.
        dtype: The type that both are stored in.

    Returns:
        The scale and the shift, each of shape (channels,); None where it changes nothing, but for
        the scale of a convolution, which has to have a weight.

    Raises:
        FoldRefusedError: One of them does not fit its type.
    """
    wide = merged.expand(channels)
    bare = merged.is_shifting and form is Leftover.AFFINE
    scale = None if bare else checked(index, wide.scale, dtype, "the scale ")
    shift = None if merged.is_scaling else checked(index, wide.shift, dtype, "the shift ")
    fault = None if scale is None else scale_fault(wide.scale, scale)
    if fault is not None:
        detail = f"the scale {fault.what} on channel {fault.channel}"
        raise FoldRefusedError(index, Reason.RANGE, detail)
    return scale, shift
