"""How far a value may be from the reference's: by its own rounding, or by what twins differ by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from bnfold.verify.bounds import (
    F64,
    LINEAR,
    ROUNDINGS,
    Operation,
    channel_axis,
    fitting,
    rounding,
)
from bnfold.verify.judge import Verdict
from bnfold.verify.result import SiteResult
from bnfold.verify.torch_operations import HUGE, Fixed, operation
from bnfold.verify.torch_steps import Step, Value

Compare = Callable[[Value], SiteResult]

# What float64 itself leaves of a value, relative: far below what is asked of float32.
SLACK = 2.0**-40
# So many times what the twins differ by; they are off by more than a fold, but there are only two.
LIMIT = 8.0
# So many times its bound a value is off for another reason than rounding; and so near it is still
# the same value.
SURE, NEAR = 4.0, 0.5


def by_rounding(step: Step, made: Tensor, unit: float, steps: float, fixed: Fixed) -> Compare:
    """Against what rounding the operator's own constants explains, for each channel.

    Args:
        step: The operator.
        made: What it computed.
        unit: Of its coarsest constant that changed; 0 where none did.
        steps: How many roundings such a constant has behind it.
        fixed: Whether a tensor is a constant.
    """
    what = operation(step.op, step.given, fixed)
    axis = channel_axis(what.op_type, made.dim())
    size, own = _norms(made, axis), np.zeros(1)
    if unit:
        own = fitting(rounding(what, _plain(made).numpy(), axis, once=True).once(), size.size)
    total = float(np.linalg.norm(size)) or 1.0
    slack = SLACK * (size + own + total / math.sqrt(size.size))
    count = math.sqrt(made.numel() / size.size)
    linear = _without_bias(what, made, axis) if unit and what.op_type in LINEAR else None

    def bound_of(roundings: float, value: Value) -> F64:
        # One rounding is of the result alone; more are of all that it was computed from.
        added = _fitting(value.offsets, size) * count if roundings > 1 else 0.0
        return np.broadcast_to(roundings * unit * (own + added) + slack, size.shape)

    def compare(value: Value) -> SiteResult:
        bound = bound_of(steps, value)
        apart = _norms(_difference(made, value.value), axis)
        ratios = _ratios(apart, bound)
        channel = int(ratios.argmax())
        return SiteResult(
            step.name, step.op, step.name, value.name, Verdict.PASS,
            float(np.linalg.norm(apart)) / total, float(np.linalg.norm(bound)) / total,
            float(ratios[channel]), channel if size.size > 1 else None,
            # Who spoils what bnfold made has something of unknown origin.
            None if linear is None else _caught(linear, bound_of(ROUNDINGS, value), apart),
        )  # fmt: skip

    return compare


def by_drift(step: Step, made: Tensor, twins: Sequence[Tensor]) -> Compare:
    """Against what the twins differ by.

    Args:
        step: The operator.
        made: What it computed.
        twins: The same with other roundings.
    """
    floor = drift_of(made, twins)
    total = float(_norms(made, None)[0]) or 1.0

    def compare(value: Value) -> SiteResult:
        apart = distance(made, value.value)
        return SiteResult(
            step.name, step.op, step.name, value.name, Verdict.PASS, apart / total,
            floor / total, float(_ratios(np.array(apart), np.array(floor))),
        )  # fmt: skip

    return compare


def drift_of(value: Tensor, twins: Sequence[Tensor]) -> float:
    """The norm of what rounding explains of a value, by what its twins differ from it."""
    far = [distance(value, twin) for twin in twins]
    # A few numbers may happen to be near in both twins.
    limit = LIMIT * (1 + LIMIT / max(value.numel(), 1))
    return limit * max(far, default=0.0) + SLACK * float(_norms(value, None)[0])


def distance(one: Tensor, other: Tensor) -> float:
    """The norm of the difference of two tensors; infinite where one of them only is not finite."""
    return float(_norms(_difference(one, other), None)[0])


def _difference(one: Tensor, other: Tensor) -> Tensor:
    apart = one - other
    if not apart.numel() or float(apart.abs().max()) < HUGE:
        return apart
    same = (one == other) | (one.isnan() & other.isnan())
    # Norms leave out what is huge.
    return torch.where(same, 0.0, torch.where(apart.abs() < HUGE, apart, HUGE / 2))


def _norms(value: Tensor, axis: int | None) -> F64:
    """The Euclidean norm of each channel, without what is put in place of infinities."""
    others = [i for i in range(value.dim()) if i != axis]
    value = _plain(value)
    found = torch.linalg.vector_norm(value, dim=others) if others else value.abs()
    return np.atleast_1d(found.numpy())


def _plain(value: Tensor) -> Tensor:
    """Without what is put in place of infinities."""
    if not value.numel() or float(value.abs().max()) < HUGE:
        return value
    return torch.where(value.abs() < HUGE, value, 0.0)


def _ratios(apart: F64, bound: F64) -> F64:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: F64 = np.where(apart > 0, apart / bound, 0.0)
    return found


def _fitting(offsets: F64, size: F64) -> F64:
    """Offsets for each channel, or their largest where they are of other channels."""
    return offsets if offsets.size in (1, size.size) else np.full(1, offsets.max())


def _without_bias(what: Operation, made: Tensor, axis: int | None) -> F64:
    """The norm of each channel of what the weight alone makes."""
    bias = what.inputs[2] if len(what.inputs) > 2 else None
    after = (1,) * (made.dim() - 1 - (axis or 0))
    return _norms(made if bias is None else made - torch.from_numpy(bias.reshape(-1, *after)), axis)


def _caught(linear: F64, bound: F64, apart: F64) -> float | None:
    """The smallest power of two that is flagged, had the whole weight a factor of 1 more than it.

    Args:
        linear: The norm of each channel of what the weight makes.
        bound: How far off each may be by rounding.
        apart: How far off each is.
    """
    # The spoilt weight is rounded itself, and its bound is by a part larger.
    needed = (SURE + 2) * bound + apart
    least = float((needed / np.maximum(linear, 1e-300)).min())
    found = 2.0 ** math.ceil(math.log2(least)) if least > 0 else 0.0
    return found if 0 < found < NEAR else None
