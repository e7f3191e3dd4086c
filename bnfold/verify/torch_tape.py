"""The reference's run in float64: what operators compute is kept, to be found by its numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from bnfold.torch_guard import storage_of
from bnfold.verify.bounds import F64
from bnfold.verify.torch_operations import HUGE
from bnfold.verify.torch_steps import MOVES, Arguments, Step, Value, Walk, first_float, written

# Tensors of the reference kept at a time; what comes later is not compared.
MOST_BYTES = 4 << 30
_SAMPLES = 64


@dataclass(slots=True)
class _Shelf:
    """All values of one shape, and some numbers of each to find one by."""

    values: list[Value] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)


class Tape(Walk):  # type: ignore[no-untyped-call]
    """The reference's run.

    Args:
        module: As for `Walk`.
        inputs: Likewise.
    """

    def __init__(self, module: nn.Module, inputs: Iterable[Any]) -> None:
        super().__init__(module, inputs)
        self._shelves: dict[tuple[int, ...], _Shelf] = {}
        self._offsets: Any = WeakTensorKeyDictionary()
        self._by_storage: dict[int, list[Value]] = {}
        self._room = MOST_BYTES

    def before(self, step: Step, call: Arguments) -> None:  # noqa: ARG002
        """Values that are written over are copied first."""
        if not step.func._schema.is_mutable:
            return
        for target in written(step.func, step.given):
            for kept in self._by_storage.pop(storage_of(target), ()):
                kept.value = kept.value.clone()

    def took(self, step: Step, call: Arguments, result: Any) -> None:  # noqa: ARG002
        """Keeps what was computed."""
        made = first_float(result)
        if made is None or not step.varies:
            return
        offsets = offsets_of(step, self._before(step))
        self._offsets[made] = offsets
        if not step.computes or made.nbytes > self._room:
            return
        self._room -= made.nbytes
        kept = Value(step.name, made.detach(), offsets)
        self._by_storage.setdefault(storage_of(made), []).append(kept)
        shelf = self._shelves.setdefault(tuple(made.shape), _Shelf())
        shelf.values.append(kept)
        shelf.samples.append(sampled(made))

    def _before(self, step: Step) -> F64:
        """The offsets of what varies among the operands."""
        known = [self._offsets.get(v) for v in step.given.values() if isinstance(v, Tensor)]
        return next((k for k in known if k is not None), np.zeros(1))

    def nearest(self, value: Tensor, count: int) -> list[Value]:
        """Values of the shape of ``value`` that are nearest to it, the nearest first."""
        shelf = self._shelves.get(tuple(value.shape))
        if shelf is None:
            return []
        apart = torch.stack(shelf.samples) - sampled(value)
        order = torch.nan_to_num(apart, nan=torch.inf).square().sum(dim=1).argsort(stable=True)
        return [shelf.values[int(i)] for i in order[:count]]


def sampled(value: Tensor) -> Tensor:
    """Some numbers of a tensor, the same places for every tensor of its shape."""
    places = torch.linspace(0, value.numel() - 1, min(_SAMPLES, value.numel())).round().long()
    found = torch.take(value, places)
    return torch.where(found.abs() < HUGE, found, 0.0)


def offsets_of(step: Step, before: F64) -> F64:
    """The size of all constants added up so far, for each channel or as one number."""
    # A weight is no offset, and large.
    wanted = {k: v for k, v in step.constants.items() if k != "weight" or "norm" in step.op}
    sizes = {name: np.abs(value.numpy()) for name, value in wanted.items()}
    if "batch_norm" in step.op and {"running_mean", "running_var"} <= sizes.keys():
        scale = sizes.get("weight", np.ones(1)) / np.sqrt(
            sizes["running_var"] + float(step.given.get("eps", step.given.get("epsilon", 1e-5)))
        )
        moved: F64 = scale * (before + sizes["running_mean"]) + sizes.get("bias", np.zeros(1))
        return moved
    if step.op == "convolution" or "bias" in sizes or step.op in ("addmm", "mm"):
        return np.asarray(sizes.get("bias", sizes.get("self", np.zeros(1)))).reshape(-1)
    other = next(iter(sizes.values()), None)
    if other is None or not other.size:
        return before if step.func.is_view or step.op in MOVES else np.zeros(1)
    return _stepped(step.op.rstrip("_"), before, other)


def _stepped(op: str, before: F64, constant: F64) -> F64:
    # A constant per channel has one axis that is more than 1.
    flat = constant.reshape(-1) if constant.size == max(constant.shape, default=1) else (
        np.full(1, constant.max())
    )  # fmt: skip
    if flat.size > 1 and before.size not in (1, flat.size):
        flat = np.full(1, flat.max())
    if op in ("add", "sub", "rsub"):
        return before + flat
    if op == "mul":
        return before * flat
    with np.errstate(divide="ignore"):
        return before / flat if op == "div" else np.zeros(1)
