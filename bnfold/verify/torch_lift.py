"""A torch model in float64, whatever types are written in its code.

Every operator sees its floating arguments in float64 and is asked for float64, so that casts
between floating types do nothing. It works below modules, graphs and programs alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex32: torch.complex128, torch.complex64: torch.complex128,
}  # fmt: skip


def lifted(tensor: Tensor) -> Tensor:
    """``tensor`` in float64 on the CPU, if it is floating; a copy if anything changes."""
    return tensor.to("cpu", _WIDE.get(tensor.dtype, tensor.dtype))


class Lift(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, operators compute in float64.

    A narrow tensor that comes in from outside is replaced by one wide twin for as long as this
    lives, so that writing to it is seen by who reads it later.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        wide_args, wide_kwargs = tree_map(self._wide, (args, kwargs or {}))
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self.higher_order(func, wide_args, wide_kwargs)
        return self.compute(func, wide_args, wide_kwargs)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator makes of wide arguments."""
        return widened(func(*args, **kwargs))

    def higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator makes that calls graphs; these are lifted, too."""
        called = graph_called(func, args)
        if called is None:
            raise NotImplementedError(f"the operator {func.name()} can't be computed in float64")
        with self:
            return called[0](*called[1], **kwargs)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return _WIDE.get(value, value)
        if not isinstance(value, Tensor) or value.dtype not in _WIDE:
            return value
        if id(value) not in self._twins:
            # The narrow one is kept, or another might come to have its identity.
            self._twins[id(value)] = value, value.to(_WIDE[value.dtype])
        return self._twins[id(value)][1]


def graph_called(func: Any, args: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """Which graph an operator calls, and with what; None of an operator that is not known."""
    if func.name() == "cond":
        return args[1 if bool(args[0]) else 2], args[3]
    if func.name().startswith("wrap_with_"):
        first = next(i for i, value in enumerate(args) if callable(value))
        return args[first], args[first + 1 :]
    return None


def widened(result: Any) -> Any:
    """Results in float64: operators that make numbers out of nothing choose their own type."""
    return tree_map(
        lambda v: v.to(_WIDE[v.dtype]) if isinstance(v, Tensor) and v.dtype in _WIDE else v, result
    )
