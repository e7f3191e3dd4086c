"""Which modules the code of another one takes apart, read off its bytecode.

A module that is only ever called can be captured by itself: what it takes and gives is what it
always was. One whose layers somebody calls one by one, or hands to other code, can not: what is
between its layers is then seen from outside. A name that code takes from something that is not
known here counts for every module that has an attribute of this name.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

_IGNORED = ("CACHE", "EXTENDED_ARG", "RESUME", "PRECALL")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_OF_SELF = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER", "GET_ITER")
_SELF = ("LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_BORROW")


@dataclass(frozen=True, slots=True)
class Reach:
    """What code takes apart: modules that it knows, and names that it takes from anything.

    ``taken`` are all attributes that it takes from modules that it knows, but for calls of these;
    ``asked`` the classes of modules that it asks for by ``isinstance``.
    """

    modules: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    taken: frozenset[tuple[int, str]] = frozenset()
    asked: frozenset[type] = frozenset()

    def __or__(self, other: Reach) -> Reach:
        return Reach(
            self.modules | other.modules, self.names | other.names, self.taken | other.taken,
            self.asked | other.asked,
        )  # fmt: skip

    def asks_for(self, module: nn.Module) -> bool:
        """Whether it takes another path for a module of the class of ``module``."""
        return isinstance(module, tuple(self.asked))

    def takes(self, module: nn.Module, names: Iterable[str]) -> bool:
        """Whether it takes one of these attributes from ``module``, or from what may be that."""
        return any((id(module), name) in self.taken or name in self.names for name in names)

    def into(self, module: nn.Module) -> bool:
        """Whether it takes apart ``module``, or a module inside."""
        return any(
            id(part) in self.modules or not self.names.isdisjoint(_own_names(part))
            for part in module.modules()
            if not _is_torch(part)
            or isinstance(part, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        )


def reach_of(module: nn.Module) -> Reach:
    """What the forward of ``module`` takes apart, and the methods that it calls."""
    if _is_torch(module):
        return Reach()
    search = _Search(module)
    search.read("forward")
    return Reach(
        frozenset(search.modules), frozenset(search.names), frozenset(search.taken),
        frozenset(search.asked),
    )  # fmt: skip


def asks_for_sizes(module: nn.Module) -> bool:
    """Whether the code of ``module``, or what that calls, may ask tensors for their sizes.

    A graph that was captured on inputs of one size does not show that.
    """
    return any(not _SIZES.isdisjoint(code.co_names) for code in _called_by(module))


def stores(module: nn.Module) -> bool:
    """Whether the code of ``module``, or what that calls, leaves anything behind but statistics."""
    steps = (step for code in _called_by(module) for step in dis.get_instructions(code))
    return any(step.opname in _STORES and step.argval not in module._buffers for step in steps)


_SIZES = frozenset({"shape", "size", "numel", "nelement", "nbytes"})
_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL")


def _called_by(module: nn.Module) -> Iterator[CodeType]:
    """The code of a forward, of the methods and functions that it names, and of what these name."""
    left = [] if _is_torch(module) else [inspect.unwrap(type(module).forward)]
    seen: set[int] = set()
    while left:
        function = left.pop()
        own = isinstance(function, FunctionType) and not _is_of_torch_code(function)
        if not own or id(function) in seen:
            continue
        seen.add(id(function))
        for code in _codes(function.__code__):
            yield code
            left += [inspect.unwrap(found) for found in _named(type(module), function, code)]


def _named(kind: type[nn.Module], function: FunctionType, code: CodeType) -> Iterator[Any]:
    """Whatever functions the names in ``code`` may stand for."""
    known = [function.__globals__.get(name) for name in code.co_names]
    spaces = [vars(found) for found in known if isinstance(found, ModuleType)]
    for name in code.co_names:
        for space in (*map(vars, kind.__mro__), *spaces):
            if isinstance(space.get(name), FunctionType):
                yield space[name]
    yield from (found for found in known if isinstance(found, FunctionType))


@dataclass(slots=True)
class _Search:
    """One walk through the methods of a module."""

    module: nn.Module
    modules: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    taken: set[tuple[int, str]] = field(default_factory=set)
    asked: set[type] = field(default_factory=set)
    _read: set[str] = field(default_factory=set)

    def read(self, method: str) -> None:
        """A method of the module, once."""
        function = getattr(type(self.module), method, None)
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or _is_of_torch_code(function):
            return
        if method not in self._read:
            self._read.add(method)
            own = function.__code__.co_varnames[:1]
            for code in _codes(function.__code__):
                self._read_code(code, own)
                self.asked.update(_asked(code, function.__globals__))

    def _read_code(self, code: CodeType, own: tuple[str, ...]) -> None:
        steps = [step for step in dis.get_instructions(code) if step.opname not in _IGNORED]
        known: Any = None
        called = False
        for place, step in enumerate(steps):
            before, after = steps[place - 1] if place else None, (*steps, None)[place + 1]
            if step.opname in _SELF and step.argval in own:
                known = self.module
                called = before is not None and before.opname == "PUSH_NULL"
                called = called and not _is_indexed(steps[place:])
                if not _stays(before, after):
                    self._hand_over()
            elif step.opname in _ATTRIBUTE:
                known = self._take(known, step, after, called)
            else:
                known = None

    def _hand_over(self) -> None:
        """The module itself goes to other code, which may take all of it apart."""
        for part in self.module.modules():
            if part is not self.module:
                self.modules.add(id(part))
                self.taken.update((id(part), name) for name in _own_names(part))

    def _take(
        self, known: Any, step: dis.Instruction, after: dis.Instruction | None, called: bool
    ) -> Any:
        """What an attribute is; ``called`` says that the last of them is for a call."""
        name = step.argval
        called = _is_call(step) or (called and not _is_looked_at(after)) or _is_pushed(after)
        if not isinstance(known, nn.Module):
            self.names.add(name)
            return None
        if known is not self.module and not called:
            self.taken.add((id(known), name))
        if known is self.module:
            self.read(name)
        elif name in _own_names(known):
            self.modules.add(id(known))
        found = known._modules.get(name)
        if found is not None and not called and not _is_looked_at(after):
            self.modules.add(id(found))
        return found


_ASKING = ("getattr", "hasattr", "isinstance", "super", "type", "len", "enumerate", "zip",
           "reversed", "iter", "id")  # fmt: skip


def _stays(before: dis.Instruction | None, after: dis.Instruction | None) -> bool:
    """Whether a module that is loaded is only asked for something, and goes nowhere."""
    if before is not None and before.opname == "LOAD_GLOBAL" and before.argval in _ASKING:
        return True
    return after is not None and after.opname.startswith(_OF_SELF)


def _is_indexed(steps: list[dis.Instruction]) -> bool:
    """Whether an entry of something is taken before the next call."""
    ahead = takewhile(lambda step: not step.opname.startswith("CALL"), steps)
    return any(step.opname == "BINARY_SUBSCR" for step in ahead)


def _asked(code: CodeType, names: Mapping[str, Any]) -> Iterator[type]:
    """The classes of modules that code names, if it asks for classes at all."""
    if "isinstance" not in code.co_names and "type" not in code.co_names:
        return
    found: Any = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            found = names.get(step.argval)
        elif step.opname in _ATTRIBUTE and isinstance(found, ModuleType):
            found = getattr(found, step.argval, None)
        elif step.opname not in _IGNORED:
            found = None
        for kind in found if isinstance(found, tuple) else (found,):
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module:
                yield kind


def _is_pushed(after: dis.Instruction | None) -> bool:
    """Whether it is the next thing to be called, with arguments that are gathered first."""
    return after is not None and after.opname == "PUSH_NULL"


def _is_call(step: dis.Instruction) -> bool:
    """Whether an attribute is taken in order to be called, and for nothing else."""
    # From Python 3.12 on the one instruction does both, and says which in its lowest bit.
    as_method = step.opname == "LOAD_ATTR" and "NULL|" in step.argrepr
    return step.opname == "LOAD_METHOD" or as_method


def _is_looked_at(after: dis.Instruction | None) -> bool:
    """Whether all that happens to it is another attribute, or a question whether it is there."""
    if after is None:
        return False
    tested = "JUMP" in after.opname or after.opname == "TO_BOOL"
    nothing = after.opname == "LOAD_CONST" and after.argval is None
    return after.opname in _ATTRIBUTE or tested or nothing


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _own_names(module: nn.Module) -> set[str]:
    """What can be taken from a module that shows what is inside: parts, tensors, methods."""
    groups: tuple[Mapping[str, Any], ...] = (
        module._modules,
        module._parameters,
        module._buffers,
        *(vars(kind) for kind in type(module).__mro__ if not _is_of_torch(kind)),
    )
    names = {name for group in groups for name in group if not name.startswith("__")}
    return names - {"forward"}


def _is_of_torch_code(function: FunctionType) -> bool:
    return function.__module__.startswith("torch.")


def _is_torch(module: nn.Module) -> bool:
    return _is_of_torch(type(module))


def _is_of_torch(kind: type) -> bool:
    return kind is object or kind.__module__.startswith("torch.")
