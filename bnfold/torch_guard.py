"""A module is left as it was, whatever its forward does while it is captured."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Attributes of all modules inside, and random states, are as before when this ends.

    Raises:
        TraceError: Numbers were drawn from Python's or numpy's generators. What was captured is
            then only one of the things that the module does.
    """
    kept = [
        _Attributes.of(part)
        for part in module.modules()
        if not isinstance(part, torch.jit.ScriptModule)
    ]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    python, arrays = random.getstate(), np.random.get_state()
    drawn = False
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for attributes in kept:
                attributes.restore()
            drawn = random.getstate() != python or not _same_state(np.random.get_state(), arrays)
            random.setstate(python)
            np.random.set_state(arrays)
    if drawn:
        raise TraceError("random numbers are drawn while tracing")


def _same_state(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True, slots=True)
class _Attributes:
    """The attributes of one object, and what stood in those that are plain containers."""

    store: dict[str, Any]
    values: dict[str, Any]
    contents: tuple[tuple[Any, Any], ...]

    @classmethod
    def of(cls, module: nn.Module) -> _Attributes:
        values = vars(module)
        containers = [value for value in values.values() if type(value) in _CONTAINERS]
        return cls(values, dict(values), tuple((box, box.copy()) for box in containers))

    def restore(self) -> None:
        for box, before in self.contents:
            if not _identical(box, before):
                box.clear()
                (box.extend if isinstance(box, list | deque) else box.update)(before)
        if not _identical(self.store, self.values):
            self.store.clear()
            self.store.update(self.values)


def _identical(one: Any, other: Any) -> bool:
    """Whether two containers hold the same objects; equality of tensors is none of our business."""
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(k in other and other[k] is v for k, v in one.items()) and [*one] == [*other]
    if isinstance(one, set):
        return {id(v) for v in one} == {id(v) for v in other}
    return all(a is b for a, b in zip(one, other, strict=True))


class Pure(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a trace would do for real: draw random numbers, write to the user's tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = {storage_of(tensor) for _, _, tensor in tensors_of(module)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise TraceError(f"random numbers are drawn while tracing ({func})")
        if func._schema.is_mutable and self._writes(func, args, kwargs or {}):
            raise TraceError(f"a tensor of the module is written to while tracing ({func})")
        return func(*args, **(kwargs or {}))

    def _writes(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        given = {
            **dict(zip((a.name for a in func._schema.arguments), args, strict=False)),
            **kwargs,
        }
        written = [given.get(a.name) for a in func._schema.arguments if a.is_write]
        return any(
            storage_of(value) in self._held
            for value in tree_leaves(written)
            if isinstance(value, Tensor)
        )


# ---- what modules hold ----


_TALKING = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch says to the terminal of an export: it is in the error, or no news."""
    loggers = [logging.getLogger(name) for name in _TALKING]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def storage_of(tensor: Tensor) -> int:
    """What tells storages apart: where the data is, or which object it is if there is no such."""
    if tensor.layout is not torch.strided:
        return -id(tensor)
    storage = tensor.untyped_storage()
    return storage.data_ptr() or -int(storage._cdata)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Path, attribute and tensor of all that modules hold, under the first path of each module."""
    for path, part in module.named_modules():
        yield from ((path, attribute, tensor) for attribute, tensor in _held(part))


Trail = tuple[nn.Module, ...]


def names_of(
    module: nn.Module, path: str = "", above: Trail = ()
) -> Iterator[tuple[Trail, str, str, Tensor]]:
    """Every name of every tensor: the modules on the way, the path, the attribute, the tensor."""
    trail = (*above, module)
    yield from ((trail, path, attribute, tensor) for attribute, tensor in _held(module))
    for name, child in module._modules.items():
        if child is not None and child not in trail:
            yield from names_of(child, join(path, name), trail)


def owners(module: nn.Module) -> Mapping[int, tuple[tuple[str, str], ...]]:
    """Who holds a storage: paths of modules and attributes, under all their names."""
    found: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for _, path, attribute, tensor in names_of(module):
        found[storage_of(tensor)].append((path, attribute))
    return {storage: tuple(held) for storage, held in found.items()}


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for group in (module._parameters, module._buffers, vars(module)):
        for attribute, value in group.items():
            if isinstance(value, Tensor) and not is_lazy(value):
                yield attribute, value


def join(*parts: str) -> str:
    """A path out of its parts, some of which may be empty."""
    return ".".join(part for part in parts if part)
