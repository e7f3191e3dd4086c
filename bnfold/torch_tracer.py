"""An fx tracer that stops at the layers a fold is about and names everything as the user does.

Leaves are the modules of torch.nn, subclasses of its layers that compute what their base does,
and modules that somebody watches or rewrites (hooks, reparametrisations). All else is traced
through, so that a BatchNorm with a fused activation becomes its two operators.
"""

from __future__ import annotations

import dis
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_flatten, tree_unflatten

from bnfold.torch_assembly import assembled, targets
from bnfold.torch_guard import Pure, join, tensors_of
from bnfold.torch_leaves import is_unmodified
from bnfold.torch_reparam import foreign_hooks, reparametrised

AUTOCAST = "autocast"
"""Key of ``node.meta``: the node was recorded under autocast, which the graph does not show."""

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_leaf(module: nn.Module) -> bool:
    """Whether a trace holds one call of ``module`` and nothing of what is inside."""
    script = isinstance(module, torch.jit.ScriptModule)
    return script or is_watched(module) or is_of_torch(module)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody outside of its forward sees or makes tensors of this module."""
    return bool(foreign_hooks(module) or reparametrised(module))


def is_layer(module: nn.Module) -> bool:
    """Whether it is a layer of torch.nn, by itself or as a subclass that changes nothing."""
    base = next((cls for cls in type(module).__mro__ if cls in LAYERS), None)
    return base is not None and is_unmodified(module, base)


def is_of_torch(module: nn.Module) -> bool:
    """Whether what it computes is written in torch.nn, and it is no mere container of modules."""
    if is_layer(module):
        return True
    home = type(module).__module__
    wraps = isinstance(module, CONTAINERS) or home.startswith("torch.nn.parallel")
    ours = home.startswith(("torch.nn.", "torch.ao.nn.")) and not wraps
    return ours and is_unmodified(module, type(module))


def trace(
    whole: nn.Module,
    path: str = "",
    arguments: Mapping[str, object] | None = None,
    optional: bool = False,
) -> fx.GraphModule:
    """The submodule of ``whole`` at ``path`` as a graph; its nodes have the paths of ``whole``.

    Args:
        whole: The module that names everything.
        path: The submodule whose forward is traced, without hooks of its own.
        arguments: What it is called with, by parameter. Tensors become inputs of the graph, all
            else is taken as it is. Without, every parameter that has no default is an input.
        optional: Parameters that have a default are inputs too.

    Raises:
        Exception: Whatever stops a trace.
    """
    root = whole.get_submodule(path)
    tracer = ModuleTracer(path, arguments, optional)
    with Pure(root):
        graph = tracer.trace(root)
    held = {name: tracer.tensors[name] for name in targets(graph, "get_attr")}
    leaves = {name: whole.get_submodule(name) for name in targets(graph, "call_module")}
    return assembled(graph, {**leaves, **held}, type(root).__name__, root.training)


class ModuleTracer(fx.Tracer):
    """See ``trace``; ``tensors`` are those that nodes may read, by the names that they have."""

    def __init__(self, path: str, arguments: Mapping[str, object] | None, optional: bool) -> None:
        super().__init__()
        self._prefix = f"{path}." if path else ""
        self._arguments = arguments
        self._optional = optional
        self._names: dict[int, str] = {}
        self.tensors: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See ``is_leaf``."""
        del module_qualified_name
        return is_leaf(m)

    def path_of_module(self, mod: nn.Module) -> str:
        """The first path of a module, from the user's module."""
        return self._prefix + super().path_of_module(mod)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer becomes a node under its first name; its shape stays numbers."""
        del attr
        name = self._names.get(id(attr_val))
        if name is None or not isinstance(attr_val, Tensor):
            return attr_val
        if name not in parameter_proxy_cache:
            node = self.create_node("get_attr", name, (), {})
            parameter_proxy_cache[name] = HeldProxy(node, self, attr_val)
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """A tensor by its name; fx would set one that has no name on the user's module."""
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        if id(a) not in self._names:
            name = self.get_fresh_qualname("_tensor_constant")
            self._names[id(a)] = name
            self.tensors[name] = a
        return self.create_node("get_attr", self._names[id(a)], (), {})

    def get_fresh_qualname(self, prefix: str) -> str:
        """A name that neither the user's module nor another constant has."""
        return next(
            name
            for number in range(len(self.tensors) + 1)
            if (name := f"{prefix}{number}") not in self.tensors and not hasattr(self.root, name)
        )

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: object = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        """Inputs; fx would take every parameter that has a default as given."""
        del root_fn, is_module, concrete_args
        assert isinstance(self.root, nn.Module)
        held = [(join(path, name), tensor) for path, name, tensor in tensors_of(self.root)]
        self.tensors = {self._prefix + name: tensor for name, tensor in held}
        self._names = {id(tensor): self._prefix + name for name, tensor in reversed(held)}
        # That of the instance, if somebody replaced it there; fx takes that of the class.
        forward = self.root.forward
        signature = inspect.signature(forward)
        call = signature.bind_partial()
        call.arguments.update(self._inputs(signature.parameters.values()))
        return (lambda: forward(*call.args, **call.kwargs)), []

    def _inputs(self, parameters: Iterable[inspect.Parameter]) -> dict[str, object]:
        if self._arguments is not None:
            return {name: self._placeholders(name, v) for name, v in self._arguments.items()}
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [p for p in parameters if p.kind not in variadic]
        given = [p.name for p in named if p.default is p.empty or self._optional]
        return {name: self.create_proxy("placeholder", name, (), {}) for name in given}

    def _placeholders(self, name: str, value: object) -> object:
        leaves, spec = tree_flatten(value)
        inputs = [
            self.create_proxy("placeholder", name, (), {}) if isinstance(v, Tensor) else v
            for v in leaves
        ]
        return tree_unflatten(inputs, spec)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Every node says whether autocast was on."""
        node = super().create_node(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            node.meta[AUTOCAST] = True
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node while the code runs."""
        return TracedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What is asserted is true in every call that gives a result; all else is unknown."""
        del obj
        frame = sys._getframe(2)
        if _asserts(frame):
            return True
        where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
        raise TraceError(f"a branch depends on what a tensor holds, or on its shape ({where})")


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class TracedProxy(fx.Proxy):
    """A value whose augmented assignments stay what they are; fx takes ``v += x`` for ``v + x``."""

    __iadd__ = _in_place(operator.iadd)
    __isub__ = _in_place(operator.isub)
    __imul__ = _in_place(operator.imul)
    __itruediv__ = _in_place(operator.itruediv)


class HeldProxy(TracedProxy):
    """A tensor that a module holds: what is known of it without its numbers."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self._tensor = tensor

    shape = property(lambda self: self._tensor.shape)
    ndim = property(lambda self: self._tensor.ndim)
    dtype = property(lambda self: self._tensor.dtype)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one size."""
        return self._tensor.shape if dim is None else self._tensor.shape[dim]

    def dim(self) -> int:
        """The rank."""
        return self._tensor.ndim

    def numel(self) -> int:
        """The number of entries."""
        return self._tensor.numel()


def _asserts(frame: FrameType) -> bool:
    """Whether ``frame`` stands at a branch whose false side is a failed assertion."""
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname not in ("CACHE", "TO_BOOL")]
    at = next((i for i, step in enumerate(code) if step.offset >= frame.f_lasti), len(code))
    if at + 1 >= len(code) or "JUMP" not in code[at].opname:
        return False
    after = code[at + 1]
    if "IF_FALSE" in code[at].opname:
        after = next(step for step in code if step.offset == code[at].argval)
    return after.opname == "LOAD_ASSERTION_ERROR"
