"""Parameters that something computes anew at every call, and hooks: what else touches a tensor.

torch knows four ways to compute a parameter from others: weight_norm and spectral_norm by a hook
before the forward, prune by such a hook and a mask, parametrize by a property. A fold needs an
ordinary parameter; ``materialise`` makes one of the value that the next call would see.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import _Orthogonal, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Hook = WeightNorm | SpectralNorm | prune.BasePruningMethod

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


def reparametrised(module: nn.Module) -> Mapping[str, str]:
    """The attributes of ``module`` itself that are computed anew at every call, and by what."""
    made = {_attribute(hook): _kind(hook) for hook in _computing_hooks(module)}
    if parametrize.is_parametrized(module):
        made |= dict.fromkeys(_lists(module), "parametrize")
    return made


def foreign_hooks(module: nn.Module) -> tuple[str, ...]:
    """The kinds of hooks on ``module`` that see its tensors and compute no parameter."""
    return tuple(
        kind
        for group, kind in _HOOKS.items()
        if any(not isinstance(hook, Hook) for hook in (vars(module).get(group) or {}).values())
    )


def materialise(module: nn.Module, attribute: str) -> bool:
    """Make a computed attribute an ordinary parameter of the value that the next call would see.

    A computed buffer becomes an ordinary buffer. What it was computed from is left as it is for
    whoever else holds it. False, and nothing done, if it is not computed, or if in training mode
    each call computes another value.
    """
    kind = reparametrised(module).get(attribute)
    if kind is None or _changes(module, attribute, kind):
        return False
    sources = _sources(module, attribute, kind)
    with torch.no_grad():
        value = _value(module, attribute)
    for source in [name for name in sources if name in reparametrised(module)]:
        materialise(module, source)
    held = _sources(module, attribute, kind).values()
    with torch.no_grad():
        _remove(module, attribute, kind)
    delattr(module, attribute)
    if any(isinstance(tensor, nn.Parameter) for tensor in held):
        trained = any(tensor.requires_grad for tensor in held)
        module.register_parameter(attribute, nn.Parameter(value, requires_grad=trained))
    else:
        module.register_buffer(attribute, value)
    return True


def copied(module: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    """A deep copy that shares its parameters and buffers, which it lends, by their identity.

    Also where hooks left results of a computation: torch refuses to copy those.
    """
    results = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in results}
    lent: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if is_lazy(tensor):  # a Lazy module has seen no input yet
            memo[id(tensor)] = _as_lazy(tensor)
        else:
            lent[id(tensor)] = tensor
    memo |= lent
    return copy.deepcopy(module, memo), lent


def owned(module: nn.Module, lent: Mapping[int, Tensor]) -> None:
    """Let a copy have what is still lent to it for itself; ties between tensors stay."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for store in stores:
            for name, value in store.items():
                if isinstance(value, Tensor) and id(value) in lent:
                    store[name] = copy.deepcopy(value, memo)


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of ``module`` itself that hold numbers, by name."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    both = {**module._parameters, **module._buffers}
    return [(n, t) for n, t in both.items() if t is not None and not is_lazy(t)]


def _as_lazy(tensor: Tensor) -> Tensor:
    kind: Any = type(tensor)
    return cast(Tensor, kind(tensor.requires_grad, tensor.device, tensor.dtype))


def _computing_hooks(module: nn.Module) -> Iterator[Hook]:
    hooks: Mapping[int, Callable[..., object]] = module._forward_pre_hooks
    yield from (hook for hook in hooks.values() if isinstance(hook, Hook))


def _attribute(hook: Hook) -> str:
    name = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
    return str(name)


def _kind(hook: Hook) -> str:
    if isinstance(hook, prune.BasePruningMethod):
        return "prune"
    return "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"


def _lists(module: nn.Module) -> Mapping[str, parametrize.ParametrizationList]:
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return {
        name: steps
        for name, steps in found.items()
        if isinstance(steps, parametrize.ParametrizationList)
    }


def _changes(module: nn.Module, attribute: str, kind: str) -> bool:
    """Whether calls change the value: spectral norms iterate in training, others may draw."""
    if kind == "spectral_norm":
        return module.training
    if kind != "parametrize":
        return False
    steps = _lists(module)[attribute]
    return any(step.training and not isinstance(step, _WeightNorm | _Orthogonal) for step in steps)


def _sources(module: nn.Module, attribute: str, kind: str) -> Mapping[str, Tensor]:
    """The tensors that the attribute is computed from, by the name of the attribute they are."""
    if kind == "parametrize":
        steps = _lists(module)[attribute]
        return {**dict(steps.named_parameters("", False)), **dict(steps.named_buffers("", False))}
    suffixes = ("_g", "_v") if kind == "weight_norm" else ("_orig",)
    return {attribute + suffix: getattr(module, attribute + suffix) for suffix in suffixes}


def _value(module: nn.Module, attribute: str) -> Tensor:
    """What the next call would see: between calls, what hooks left there may be out of date."""
    for hook in _computing_hooks(module):
        if not (isinstance(hook, SpectralNorm) and module.training):
            hook(module, ())
    value: Tensor = getattr(module, attribute)
    return value.detach().clone(memory_format=torch.preserve_format)


def _remove(module: nn.Module, attribute: str, kind: str) -> None:
    if kind == "weight_norm":
        remove_weight_norm(module, attribute)
    elif kind == "spectral_norm":
        remove_spectral_norm(module, attribute)
    elif kind == "prune":
        _own(module, attribute + "_orig")
        prune.remove(module, attribute)  # type: ignore[no-untyped-call]
    else:
        for name in _sources(module, attribute, kind):
            _own(_lists(module)[attribute], name)
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)


def _own(module: nn.Module, name: str) -> None:
    """A tensor of its own: torch writes the result into the one that was there."""
    old = getattr(module, name)
    new = old.detach().clone()
    if name in module._buffers:
        module._buffers[name] = new
    else:
        module._parameters[name] = nn.Parameter(new, old.requires_grad)


def _own_class(module: nn.Module) -> None:
    """A class of its own: copies of a module share the one that torch takes the property from."""
    kind = type(module)
    shared = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, shared)
