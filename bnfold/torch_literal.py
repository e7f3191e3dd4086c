"""Changes of a node that need no tensor: a number among its arguments, its in-place form."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.torch_calls import Call
from bnfold.torch_leaves import leaf_arguments

_PLAIN: Mapping[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}  # fmt: skip


def set_literal(call: Call, module: nn.Module | None, argument: str, value: float) -> None:
    """Let ``call``, which ``module`` does if there is one, read ``value`` as ``argument``."""
    node = call.node
    if module is not None:
        setattr(module, argument, value)
    elif argument in node.kwargs or not isinstance(node.target, torch._ops.OpOverload):
        node.kwargs = {**node.kwargs, argument: value}
    else:
        names = [p.name for p in node.target._schema.arguments]
        place = names.index(argument)
        if place < len(node.args):
            node.update_arg(place, value)
        else:
            node.kwargs = {**node.kwargs, argument: value}


def can_be_functional(call: Call, module: nn.Module | None, edits_nodes: bool) -> bool:
    """Whether `make_functional` can do something about an in-place operation."""
    node, target = call.node, call.node.target
    if module is not None:
        return bool(getattr(module, "inplace", False)) and leaf_arguments(module) is not None
    if not edits_nodes:
        return False
    if isinstance(target, torch._ops.OpOverload):
        return _without_underscore(target) is not None
    if node.op == "call_method":
        return str(target).endswith("_") and hasattr(Tensor, str(target).removesuffix("_"))
    return target in _PLAIN or "inplace" in node.kwargs or _is_function(target)


def make_functional(call: Call, module: nn.Module | None) -> None:
    """Let ``call`` leave the tensor that it reads as it is."""
    node, target = call.node, call.node.target
    if module is not None:
        module.inplace = False  # type: ignore[assignment]
    elif isinstance(target, torch._ops.OpOverload):
        node.target = _without_underscore(target) or target  # it may have been replaced by now
    elif node.op == "call_method":
        node.target = str(target).removesuffix("_")
    elif target in _PLAIN:
        node.target = _PLAIN[target]
    else:
        # Of a function of torch.nn.functional only the flag says so, wherever it was given.
        kwargs = {k: v for k, v in call.arguments.items() if k != "input"}
        names = {"train": "training"}
        node.kwargs = {**{names.get(k, k): v for k, v in kwargs.items()}, "inplace": False}
        node.args = node.args[:1]


def _is_function(target: Any) -> bool:
    return getattr(target, "__module__", "") == "torch.nn.functional"


def _without_underscore(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    name = target._opname
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if not name.endswith("_") or packet is None:
        return None
    found = getattr(packet, target._overloadname, None)
    return found if isinstance(found, torch._ops.OpOverload) else None
