"""What rounding explains at a site: the bounds of its operator, and of those behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnfold.verify.bounds import (
    F64,
    NOTHING,
    ROUNDINGS,
    Operation,
    Rounding,
    carried,
    channel_axis,
    fitting,
    half_steps,
    norms,
    rounding,
)
from bnfold.verify.lockstep import ELEMENTWISE, Tape, floats, offset_norms

# What float64 itself leaves of a tensor, relative, where a plan's shifts cancel; of narrower types
# so small a part of a rounding.
SLACK, PART = 2.0**-34, 2.0**-6
# Roundings of what an If, a Loop or a function makes: weights inside are not looked at one by one.
BODY = 2.0**10

_ADDS = frozenset({"Add", "Sub", "Sum"})
# What differs by so much before them differs by no more behind them.
_STEADY = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "Clip",
        "Max",
        "Identity",
        "Cast",
        "Dropout",
        "Neg",
        "Sigmoid",
        "HardSigmoid",
        "Tanh",
        "Flatten",
        "Reshape",
        "Transpose",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class _Open:
    """A tensor without a partner: its bound in units of ``u``, its norm, a weight or not.

    The bound is on each channel, or a single one on all of them together.
    """

    bound: F64
    axis: int | None
    size: float
    weighted: bool

    def on(self, op_type: str, axis: int | None, channels: int) -> F64:
        """The bound on the channels of what is made of it; on all, where those may be others."""
        kept = op_type in ELEMENTWISE and axis == self.axis
        return fitting(self.bound, channels if kept else 0)


@dataclass(frozen=True, slots=True, eq=False)
class Limit:
    """How far a tensor may be off on each channel, or on all of them together.

    Attributes:
        norms: The norm of the difference that rounding explains.
        linear: The norm of each channel, or of all, without what is added to it.
        weighted: Whether a weight is among what was rounded.
        whole: Whether it is on all channels together.
    """

    norms: F64
    linear: F64
    weighted: bool
    whole: bool

    def of(self, channels: F64) -> F64:
        """Norms of channels, as they are to be held against this."""
        return np.atleast_1d(np.linalg.norm(channels)) if self.whole else channels


@dataclass(slots=True)
class Noise:
    """The bounds of all tensors of one walk.

    Attributes:
        unit: Half an ulp, relative, of the type that weights are stored in.
        once: Whether constants were cast once, from float64 (bnfold), or computed in their type.
        tape: The reference.
    """

    unit: float
    once: bool
    tape: Tape
    _open: dict[str, _Open] = field(default_factory=dict)

    def exact(self, node: Any, done: Operation) -> bool:
        """Whether there is nothing about ``node`` that was rounded."""
        return not any(done.constant) and not any(name in self._open for name in node.input)

    def limit(self, node: Any, done: Operation, y: F64, reference: str, size: float) -> Limit:
        """How far the output of an operator may be off.

        Args:
            node: The operator.
            done: What it did.
            y: Its output.
            reference: The reference's tensor that this holds.
            size: The norm of that.
        """
        axis = channel_axis(done.op_type, y.ndim)
        linear = self._linear(done, y, axis)
        own = self._own(done, y, axis, linear)
        if not self.once:
            count = float(np.sqrt(y.size / max(linear.size, 1)))
            offsets = fitting(offset_norms(self.tape, reference, axis, count), linear.size)
            own = own + ROUNDINGS * offsets
            twin = self.tape.nodes.get(reference)
            if twin is not None and twin.onnx_node.op_type != node.onnx_node.op_type:
                # One operator in the place of several has their constants (the root of two of a
                # Gelu) as they are, and not as they were stored.
                own = own + ROUNDINGS * linear
        bound, weighted, whole = self._bound(node, done, y, axis, own)
        if _has_body(node):
            bound = bound + BODY * size
        # Of a weight that is no number nothing can be said.
        bound = np.nan_to_num(bound, nan=np.inf)
        slack = (
            max(SLACK, PART * self.unit) * size / (1.0 if whole else max(np.sqrt(own.size), 1.0))
        )
        linear = np.atleast_1d(np.linalg.norm(linear)) if whole else linear
        return Limit(self.unit * bound + slack, linear, weighted, whole)

    def pass_on(self, node: Any, name: str, done: Operation, value: Any, where: Any = None) -> None:
        """What rounding does to a tensor without a partner is seen in what is made of it.

        Args:
            node: What made the tensor.
            name: The tensor.
            done: What ``node`` did.
            value: The tensor's value.
            where: Which of its elements have no partner; all, where None.
        """
        if floats(value) is None:
            return
        value = np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
        axis = channel_axis(done.op_type, value.ndim)
        own = self._own(done, value, axis, self._linear(done, value, axis))
        bound, weighted, whole = self._bound(node, done, value, axis, own)
        if where is not None and not whole:
            bound = np.where(norms(where.astype(np.float64), axis) > 0, bound, 0.0)
        self._open[name] = _Open(bound, axis, float(np.linalg.norm(value)), weighted)

    def _linear(self, done: Operation, y: F64, axis: int | None) -> F64:
        bias = done.bias()
        return norms(y if bias is None else y - _on_axis(bias, y, axis), axis)

    def _own(self, done: Operation, y: F64, axis: int | None, linear: F64) -> F64:
        """What rounding the constants of an operator does to each channel."""
        own: Rounding = rounding(done, y, axis, once=self.once)
        nothing = own.absolute is NOTHING and own.added is NOTHING
        bound = own.once() if self.once or nothing else own.several(linear)
        bound = bound + half_steps(done, y, axis) / self.unit
        return np.broadcast_to(fitting(bound, linear.size), linear.shape)

    def _bound(
        self, node: Any, done: Operation, y: F64, axis: int | None, own: F64
    ) -> tuple[F64, bool, bool]:
        """The same with what comes from before; on all channels where it is not told on which."""
        opened = [self._open[name] for name in node.input if name in self._open]
        carried_on = [self._behind(done, before, y, axis, own.size) for before in opened]
        adds = done.op_type in _ADDS
        weighted = done.linear or any(before.weighted and adds for before in opened)
        whole = any(bound.size != own.size for bound in carried_on)
        if whole:
            own = np.atleast_1d(np.linalg.norm(own))
            carried_on = [np.atleast_1d(np.linalg.norm(bound)) for bound in carried_on]
        return sum(carried_on, own), weighted, whole

    def _behind(
        self, done: Operation, before: _Open, y: F64, axis: int | None, channels: int
    ) -> F64:
        """What the rounding of an input is in the output ``y``."""
        through = carried(done, before.bound, before.axis, once=self.once)
        if through is not None:
            return through
        if done.op_type in _ADDS | _STEADY or not before.size:
            return before.on(done.op_type, axis, channels)
        # As much, relative to what it is a part of.
        total = float(np.linalg.norm(before.bound))
        return np.full(1, total * float(np.linalg.norm(y)) / before.size)


def _has_body(node: Any) -> bool:
    """Whether an operator has operators in it: a subgraph, or a function's."""
    return bool(node.need_context()) or hasattr(node, "impl_")


def _on_axis(bias: F64, y: F64, axis: int | None) -> F64:
    if bias.ndim == 1 and axis is not None and bias.size == y.shape[axis]:
        return bias.reshape([-1 if i == axis else 1 for i in range(y.ndim)])
    return bias
