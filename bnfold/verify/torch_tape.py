"""A run of a torch model in float64, operator by operator.

`Walk` knows of every tensor whether it depends on the inputs, and what an operator is called.
`Tape` is the run of the reference: it keeps what every operator computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bnfold.torch_guard import join, names_of, storage_of
from bnfold.verify.bounds import F64
from bnfold.verify.torch_lift import Lift, widened
from bnfold.verify.torch_operations import arguments, operator_name

# Positional ones and those by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# Tensors of the reference kept at a time; what comes later is not compared.
MOST_BYTES = 4 << 30
_SAMPLES = 64
# These compute nothing.
_MOVES = frozenset(
    {"_to_copy", "clone", "copy_", "_unsafe_view", "lift_fresh", "_reshape_alias", "empty",
     "empty_like", "new_empty", "_reshape_copy", "zero_", "fill_"}
)  # fmt: skip


@dataclass(slots=True, eq=False)
class Step:
    """One call of an operator.

    Attributes:
        func: The operator.
        name: What it is called for people: the module that it runs in, or its place.
        op: The operator's own name.
        given: Its arguments, by name.
        constants: Arguments that are constants of the model: floats that depend on no input.
        varies: Whether its result depends on the inputs.
    """

    func: Any
    name: str
    op: str
    given: dict[str, Any]
    constants: dict[str, Tensor]
    varies: bool

    @property
    def computes(self) -> bool:
        """Whether its result is a new value of the model, and not a view of one or a constant."""
        return self.varies and not self.func.is_view and self.op not in _MOVES


class Walk(Lift):  # type: ignore[no-untyped-call]
    """A run in float64 that calls `took` after every operator.

    Args:
        module: What is run; it is a copy, and gets hooks.
        inputs: Its inputs: what depends on them varies.
    """

    def __init__(self, module: nn.Module, inputs: Iterable[Any]) -> None:
        super().__init__()
        self._varying: Any = WeakTensorKeyDictionary()
        for value in inputs:
            if isinstance(value, Tensor):
                self._varying[value] = True
        self.held = _holders(module)
        self._path: list[tuple[str, bool]] = []
        self._counts: dict[str, int] = {}
        self._module = module

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator makes of wide arguments."""
        step = self._step(func, args, kwargs)
        self.before(step, (args, kwargs))
        result = widened(func(*args, **kwargs))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and step.varies:
                self._varying[value] = True
        if step.varies and func._schema.is_mutable:
            for value in written(func, step.given):
                self._varying[value] = True
        self.took(step, (args, kwargs), result)
        return result

    def before(self, step: Step, call: Arguments) -> None:
        """Called before an operator."""

    def took(self, step: Step, call: Arguments, result: Any) -> None:
        """Called after an operator."""

    def varies(self, value: Tensor) -> bool:
        """Whether a tensor depends on the inputs."""
        return value in self._varying

    def holder(self, value: Tensor) -> str:
        """The name of the parameter or buffer that ``value`` is, or is a view of."""
        return self.held.get(storage_of(value), "")

    @contextmanager
    def names(self) -> Iterator[None]:
        """While it lasts, operators are called by the modules that they run in."""
        handles = []
        for path, part in self._module.named_modules():
            place = path, not any(part.children())
            handles.append(part.register_forward_pre_hook(self._enter(place)))
            handles.append(part.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, place: tuple[str, bool]) -> Any:
        return lambda _module, _args: self._path.append(place)

    def _leave(self, _module: Any, _args: Any, _result: Any) -> None:
        self._path.pop()

    def _step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        given = arguments(func, args, kwargs)
        tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        every = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        fixed = {k: v for k, v in tensors.items() if v.is_floating_point() and not self.varies(v)}
        varies = any(self.varies(value) for value in every)
        op = operator_name(func)
        return Step(func, self._name(op, fixed) if varies else "", op, given, fixed, varies)

    def _name(self, op: str, constants: dict[str, Tensor]) -> str:
        path, is_leaf = self._path[-1] if self._path else ("", False)
        held = next((name for v in constants.values() if (name := self.holder(v))), "")
        if is_leaf and path:
            return path
        if held:
            return held.rpartition(".")[0] or held
        label = join(path, op)
        self._counts[label] = self._counts.get(label, -1) + 1
        return label if not self._counts[label] else f"{label}_{self._counts[label]}"


def written(func: Any, given: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes to."""
    names = [argument.name for argument in func._schema.arguments if argument.is_write]
    return [v for v in tree_leaves([given.get(name) for name in names]) if isinstance(v, Tensor)]


def _holders(module: nn.Module) -> dict[int, str]:
    return {storage_of(tensor): join(path, name) for _, path, name, tensor in names_of(module)}


def first_float(result: Any) -> Tensor | None:
    """The first result, if it is a tensor of floats with something in it."""
    value = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(value, Tensor) or value.dtype is not torch.float64 or not value.numel():
        return None
    return value if value.dim() else None


# ---- the reference ----


@dataclass(slots=True, eq=False)
class Value:
    """What an operator of the reference computed.

    Attributes:
        name: What the operator is called.
        value: The tensor.
        offsets: The size of the constants that were added up on the way to it, for each channel.
    """

    name: str
    value: Tensor
    offsets: F64


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
    return torch.where(found.abs() < 1e150, found, torch.zeros(()))


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
        return before if step.func.is_view or step.op in _MOVES else np.zeros(1)
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
