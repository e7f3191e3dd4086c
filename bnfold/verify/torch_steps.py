"""A run of a torch model in float64, operator by operator.

`Walk` knows of every tensor whether it depends on the inputs, and what an operator is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bnfold.torch_guard import join, names_of, storage_of
from bnfold.verify.bounds import F64
from bnfold.verify.torch_lift import Lift, widened
from bnfold.verify.torch_operations import arguments, operator_name, tensors

# Positional ones and those by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# These compute nothing.
MOVES = frozenset(
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
        return self.varies and not self.func.is_view and self.op not in MOVES


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
                if value._base is not None:  # written to through a view
                    self._varying[value._base] = True
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
        every = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        held = tensors(given).items()
        fixed = {k: v for k, v in held if v.is_floating_point() and not self.varies(v)}
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
