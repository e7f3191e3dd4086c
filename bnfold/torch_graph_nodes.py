"""Nodes of fx graphs, however they spell a call: their arguments, and whether they can go."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from bnfold.torch_bodies import is_pure


def target_path(node: fx.Node) -> str:
    """The path of what ``node`` takes from the module tree; empty if it takes nothing."""
    return str(node.target) if node.op in ("get_attr", "call_module") else ""


_IN_PLACE = frozenset({operator.setitem, operator.delitem, *(
    getattr(operator, f"i{name}") for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor",
        "lshift", "rshift", "concat"))})  # fmt: skip


def can_go(node: fx.Node) -> bool:
    """Whether nobody can miss ``node`` when nobody reads it; of the unknown this is not said."""
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(target_path(node))  # type: ignore[union-attr]
        hooked = module._forward_hooks or module._forward_pre_hooks
        ours = type(module).__module__.startswith("torch.nn.modules.")
        return ours and not hooked and not module.training and not node.is_impure()
    if node.op == "call_method":
        name = str(node.target)
        return hasattr(Tensor, name) and (name.endswith("__") or not name.endswith("_"))
    return node.op == "get_attr" or (node.op == "call_function" and _pure_function(node))


def _pure_function(node: fx.Node) -> bool:
    target: Any = node.target
    if isinstance(target, OpOverload | HigherOrderOperator):
        return is_pure(node)
    if node.is_impure() or target in _IN_PLACE or "out" in node.kwargs:
        return False
    if any(_argument(node, flag) for flag in ("inplace", "training", "use_input_stats")):
        return False
    known = (getattr(target, "__module__", None) or "").split(".")[0] in ("torch", "_operator")
    return known and not target.__name__.endswith("_")


# ---- arguments ----


@cache
def _signatures(target: Any) -> tuple[tuple[str, ...], ...]:
    """The names of what can be given by position: by signature, or by ATen's overloads."""
    if inspect.isfunction(target):
        parameters = inspect.signature(target).parameters.values()
        return (tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),)
    packet = getattr(torch.ops.aten, getattr(target, "__name__", str(target)), None)
    if isinstance(target, OpOverload):
        overloads = [target]
    elif isinstance(packet, OpOverloadPacket):
        names: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(packet, name) for name in names]
    else:
        return (("self", "other"),)  # an operator of Python's
    schemas = [overload._schema.arguments for overload in overloads]
    return tuple(tuple(a.name for a in schema if not a.kwarg_only) for schema in schemas)


def _spellings(argument: str) -> tuple[str, ...]:
    return ("self", "input") if argument in ("self", "input") else (argument,)


def _positions(node: fx.Node, argument: str) -> Iterator[int]:
    """The positions that ``argument`` may have, by one overload or another."""
    for names in _signatures(node.target):
        yield from (names.index(name) for name in _spellings(argument) if name in names)


def _argument(node: fx.Node, argument: str) -> Any:
    """What ``node`` is given as ``argument``; None if nothing."""
    given = [node.kwargs[name] for name in _spellings(argument) if name in node.kwargs]
    given += [node.args[at] for at in _positions(node, argument) if at < len(node.args)]
    return given[0] if given else None


def set_argument(node: fx.Node, argument: str, value: fx.Node) -> None:
    """Let ``node`` read ``value`` as ``argument``, given as it is spelled there already."""
    for name in _spellings(argument):
        if name in node.kwargs:
            node.update_kwarg(name, value)
            return
    for position in _positions(node, argument):
        if position <= len(node.args):
            node.args = (*node.args[:position], value, *node.args[position + 1 :])
            return
    node.kwargs = {**node.kwargs, argument: value}


def describe_node(node: fx.Node, tensor: Tensor, near: fx.Node) -> None:
    """State in the metadata of ``node`` what it gives, if that of ``near`` states such things."""
    mode = getattr(near.meta.get("val"), "fake_mode", None)
    for stale in ("val", "tensor_meta", "example_value"):
        node.meta.pop(stale, None)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
