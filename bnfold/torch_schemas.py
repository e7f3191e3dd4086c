"""Arguments by the names of ATen's schemas, of an overload or of the first one that takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

Named = tuple[str, dict[str, Any], str]
"""An operation, its arguments by name, and which of them is changed in place."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that the graph holds, by its name: what a leaf module reads of its own."""

    name: str


_LISTED = frozenset({
    "view", "reshape", "permute", "expand", "repeat", "tile", "flip", "unflatten",
})  # fmt: skip
_KEYWORDS = {"input": "self", "axis": "dim"}


def by_name(name: str, args: list[Any], kwargs: dict[str, Any]) -> Named | None:
    """By the first overload of ATen that takes these arguments."""
    kwargs = {_KEYWORDS.get(key, key): value for key, value in kwargs.items()}
    if name == "einsum" and len(args) > 1 and not isinstance(args[1], list | tuple):
        args = [args[0], args[1:]]
    if name in _LISTED and len(args) > 1 and _is_number(args[-1]):
        first = 2 if name == "unflatten" else 1
        args = [*args[:first], list(args[first:])]
    for overload in _overloads(name):
        if _takes(overload, args, kwargs):
            return by_schema(overload, args, kwargs)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | fx.Node)


@cache
def _overloads(name: str) -> tuple[torch._ops.OpOverload, ...]:
    packet = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ()
    every = [getattr(packet, overload) for overload in packet.overloads()]  # type: ignore[no-untyped-call]
    found = [o for o in every if not any(a.is_out for a in o._schema.arguments)]
    # Of `mul` those of two numbers are Python's; of `arange` and its like there are no others.
    tensors = [o for o in found if any("Tensor" in str(a.type) for a in o._schema.arguments)]
    return tuple(tensors or found)


def _takes(overload: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any]) -> bool:
    parameters = overload._schema.arguments
    positional = [p for p in parameters if not p.kwarg_only]
    if len(args) > len(positional):
        return False
    given = {p.name: value for p, value in zip(positional, args, strict=False)}
    if given.keys() & kwargs.keys():
        return False
    given |= kwargs
    names = {p.name for p in parameters}
    missing = any(not p.has_default_value() and p.name not in given for p in parameters)
    if missing or not given.keys() <= names:
        return False
    return all(_fits(_kind(p), given[p.name]) for p in parameters if p.name in given)


def _kind(parameter: Any) -> str:
    """What a schema asks for; a size that varies is a whole number as others are."""
    return str(parameter.real_type).replace("SymInt", "int")


_PLAIN: Mapping[str, tuple[type, ...]] = {
    "int": (int, fx.Node), "float": (int, float, fx.Node), "bool": (bool, fx.Node),
    "number": (int, float, bool, fx.Node), "str": (str,), "ScalarType": (torch.dtype, fx.Node),
    "Device": (torch.device, str, fx.Node), "MemoryFormat": (torch.memory_format,),
    "Layout": (torch.layout,),
}  # fmt: skip


def _fits(kind: str, value: Any) -> bool:
    """Whether ``value`` may stand where a schema asks for ``kind``."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value)
    if kind.startswith("List["):
        single = isinstance(value, int) and kind == "List[int]"
        listed = isinstance(value, list | tuple) and all(_fits(kind[5:-1], v) for v in value)
        return single or listed or isinstance(value, fx.Node | torch.Size)
    if kind == "Tensor":
        return isinstance(value, fx.Node | Held | torch.Tensor)
    if kind in _PLAIN:
        exact = not (isinstance(value, bool) and kind == "int")
        return isinstance(value, _PLAIN[kind]) and exact
    return value is None or not isinstance(value, fx.Node | list | tuple | str)


def by_schema(
    overload: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Named:
    """The arguments of an overload by their names, with defaults; ``self`` is called ``input``."""
    schema = overload._schema
    arguments: dict[str, Any] = {}
    mutates = ""
    for position, parameter in enumerate(schema.arguments):
        name = "input" if parameter.name == "self" else parameter.name
        if parameter.name in kwargs:
            arguments[name] = kwargs[parameter.name]
        elif position < len(args) and not parameter.kwarg_only:
            arguments[name] = args[position]
        elif parameter.has_default_value():
            arguments[name] = parameter.default_value
        written = parameter.alias_info is not None and parameter.alias_info.is_write
        mutates = mutates or (name if written else "")
    op = overload._opname
    if op == "detach_":
        mutates = ""  # what changes has nothing to do with numbers
    return (op.removesuffix("_") if not op.startswith("_") else op), arguments, mutates
