"""One operation of a torch graph in ATen's words, however the graph spells it.

    torch.ops.aten.conv2d.default(x, w, b)      ATen overload, by its schema
    F.conv2d(x, w, bias=b), torch.add(x, y)     function, by its signature or by ATen's
    x.view(2, -1), x + y, operator.iadd(x, y)   method or operator, by ATen's schema
    self.conv(x)                                leaf module, by its attributes

Names of operations have no overload and no trailing underscore; ``mutates`` says which argument
is changed in place. The first tensor argument is called ``input`` throughout.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from bnfold.torch_leaves import leaf_arguments
from bnfold.torch_schemas import Held, Named, by_name, by_schema


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One operation.

    Attributes:
        op: Its name in ATen without overload, such as ``conv2d``; of what is not recognised the
            name that it goes by.
        arguments: By the names of ATen's schema, with defaults: nodes, held tensors, numbers,
            lists of these.
        node: The node of the graph that it stands for.
        mutates: The argument that is changed in place; empty when none is.
        module: The leaf module that is called, if one is.
    """

    op: str
    arguments: Mapping[str, Any]
    node: fx.Node
    mutates: str = ""
    module: nn.Module | None = None

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes among the arguments, in order, each as often as it is read."""
        return tuple(_nodes_in(tuple(self.arguments.values())))


Resolve = Callable[[fx.Node], fx.Node]


def as_call(node: fx.Node, resolve: Resolve) -> Call:
    """``node`` as a call.

    Args:
        node: A node that computes something.
        resolve: The node that holds what an argument stands for: bodies of higher-order operators
            read what is handed to them.
    """
    args = fx.node.map_arg(node.args, resolve)
    kwargs = fx.node.map_arg(node.kwargs, resolve)
    if node.op == "call_module":
        return _leaf(node, args, kwargs)
    named = _named(node, list(args), dict(kwargs))
    if named is None:
        return Call(_unknown(node), dict(_by_position(args, kwargs)), node)
    op, arguments, mutates = named
    if op in _IN_PLACE_FLAG and arguments.pop("inplace", False):
        mutates = "input"
    return Call(op, arguments, node, mutates)


def _nodes_in(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    if isinstance(value, slice):
        return _nodes_in((value.start, value.stop, value.step))
    if isinstance(value, Mapping):
        return _nodes_in(tuple(value.values()))
    if isinstance(value, list | tuple):
        return [node for entry in value for node in _nodes_in(entry)]
    return []


def _unknown(node: fx.Node) -> str:
    """The name of what is not recognised, such as no operation of ATen has."""
    name = getattr(node.target, "__name__", str(node.target)).rsplit(".", 1)[-1]
    # Python's own arithmetic on sizes has names that nobody else can have.
    return name if getattr(node.target, "__module__", "") == "_operator" else f"?{name}"


def _named(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Named | None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace != "aten":
            return None
        return by_schema(target, args, kwargs)
    if node.op == "call_method":
        if target == "where":  # the condition is ATen's first argument, and the method's second
            args[:2] = reversed(args[:2])
        if target in _METHODS and len(args) == 1 and not kwargs:
            return str(target), {"input": args[0]}, ""
        return by_name(str(target), args, kwargs)
    if target in _OPERATORS:
        op = _OPERATORS[target]
        if len(args) == 2 and isinstance(args[0], int | float):
            return op, {"input": args[0], "other": args[1]}, ""
        return by_name(op, args, kwargs)
    if target is getattr and args[1] in _TURNS:
        return _TURNS[args[1]], {"input": args[0]}, ""
    if target is getattr:
        return "getattr", {"0": args[0], "1": args[1]}, ""
    if target is torch._assert:
        return "_assert", {"0": args[0]}, ""
    if target is operator.getitem:
        return "getitem", {"input": args[0], "index": args[1]}, ""
    if target in _POSITIONS:
        op, names = _POSITIONS[target]
        return _finished(op, _bound(names, args, kwargs))
    if not callable(target) or isinstance(target, torch._ops.HigherOrderOperator):
        return None
    return _by_function(target, args, kwargs)


# ---- functions ----

# Dispatchers of torch.nn.functional, whose signature says nothing.
_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_POSITIONS: Mapping[Any, tuple[str, tuple[str, ...]]] = {
    **{getattr(functional, f"max_pool{n}d"): (f"max_pool{n}d", _POOL) for n in (1, 2, 3)},
    **{getattr(functional, f"adaptive_max_pool{n}d"): (f"adaptive_max_pool{n}d",
       ("input", "output_size", "return_indices")) for n in (1, 2, 3)},
}  # fmt: skip

_OPERATORS: Mapping[Any, str] = {
    operator.add: "add", operator.iadd: "add_", operator.sub: "sub", operator.isub: "sub_",
    operator.mul: "mul", operator.imul: "mul_", operator.truediv: "div", operator.itruediv: "div_",
    operator.neg: "neg", operator.matmul: "matmul", operator.pow: "pow", operator.abs: "abs",
}  # fmt: skip

_METHODS = frozenset({"float", "double", "half", "bfloat16"})  # which ATen knows as `to`

_TURNS = {"T": "numpy_T", "mT": "mT"}  # attributes that ATen knows as operations

_IN_PLACE_FLAG = frozenset({
    "relu", "relu6", "leaky_relu", "hardtanh", "silu", "hardswish", "hardsigmoid", "elu", "selu",
    "celu", "rrelu", "threshold", "mish", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_alpha_dropout",
})  # fmt: skip

_RENAMED = {"self": "input", "training": "train", "train": "train"}
_KEEPS_TRAINING = frozenset({"batch_norm"})  # there ATen itself says `training`


def _by_function(
    target: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> Named | None:
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", None) or ""
    if module == "torch.nn.functional" and inspect.isfunction(target):
        try:
            bound = inspect.signature(target).bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return _finished(name, dict(bound.arguments))
    ours = module.startswith(("torch.", "builtins")) or module in ("torch", "builtins")
    if not ours and not inspect.isbuiltin(target):
        return None
    known = getattr(torch, name, None) is target or getattr(functional, name, None) is target
    known = known or getattr(torch._C._nn, name, None) is target
    known = known or getattr(torch.linalg, name.removeprefix("linalg_"), None) is target
    return by_name(name, args, kwargs) if known else None


def _finished(op: str, arguments: dict[str, Any]) -> Named:
    renamed = {}
    for name, value in arguments.items():
        renamed[name if op in _KEEPS_TRAINING else _RENAMED.get(name, name)] = value
    if "self" in renamed:
        renamed["input"] = renamed.pop("self")
    return op, renamed, ""


def _bound(names: Sequence[str], args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs


# ---- leaf modules ----


def _leaf(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    root = node.graph.owning_module
    assert root is not None
    module = root.get_submodule(str(node.target))
    stated = leaf_arguments(module)
    if stated is None or len(args) + len(kwargs) != len(stated.reads):
        ours = type(module).__module__.startswith("torch.nn.")
        unknown = type(module).__name__ if ours else f"?{type(module).__name__}"
        return Call(unknown, dict(_by_position(args, kwargs)), node, "", module)
    arguments = dict(zip(stated.reads, args, strict=False)) | dict(kwargs) | {
        name: Held(f"{node.target}.{attribute}") if getattr(module, attribute) is not None else None
        for name, attribute in stated.held.items()
    } | dict(stated.arguments)  # fmt: skip
    return Call(stated.op, arguments, node, "input" if stated.inplace else "", module)


def _by_position(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Arguments of what is not recognised, by position."""
    return [*((str(k), v) for k, v in enumerate(args)), *kwargs.items()]
