"""Which tensors of a torch graph are constant, and what they are.

Constant is what the graph holds and nobody changes, and what is computed from such tensors alone.
Computed constants are evaluated in float64: a cast between float types is a change of storage,
not of value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bnfold.torch_calls import Call
from bnfold.torch_inplace import changed as changed_in_place
from bnfold.torch_schemas import Held
from bnfold.torch_walk import Walk

_MADE = frozenset({
    "arange", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
    "scalar_tensor", "tensor", "zeros", "zeros_like", "lift_fresh_copy", "lift_fresh",
})  # fmt: skip
_CHANCE = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "multinomial",
    "normal", "poisson", "dropout", "native_dropout", "uniform", "exponential", "empty",
    "empty_like", "cond", "while_loop",
})  # fmt: skip
_CASTS = frozenset({"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"})
_SIZES = frozenset({"size", "sym_size", "sym_numel", "numel", "dim", "getattr"})  # of whatever

# Another arrangement of the same tensor: what is written to the one is written to the other.
MOVES = frozenset({
    "alias", "clone", "contiguous", "detach", "permute", "t", "transpose", "to", "_to_copy",
    "numpy_T", "lift_fresh", "lift_fresh_copy",
})  # fmt: skip


class UncomputableError(Exception):
    """A constant can't be had: the message says why."""


class Constants:
    """The constants of a graph.

    Args:
        walk: All operations.
        held: The nodes that stand for tensors that the graph holds, with their names.
        tensors: These tensors.
        changed: Names of tensors that running the graph changes.
    """

    def __init__(
        self,
        walk: Walk,
        held: Mapping[fx.Node, str],
        tensors: Mapping[str, Tensor],
        changed: frozenset[str] = frozenset(),
    ) -> None:
        self._held, self._tensors = held, tensors
        self._unsteady = changed_in_place(walk.calls)
        self.changed = changed | {held[node] for node in self._unsteady if node in held}
        floats = {t.dtype for t in tensors.values() if t.dtype.is_floating_point}
        self.one_type = next(iter(floats)) if len(floats) == 1 else None
        self.holds_doubles = torch.float64 in floats
        self._calls: dict[fx.Node, Call] = {}
        self._values: dict[fx.Node, Any] = {}
        for call in walk.calls:
            if self._is_computed(call):
                self._calls[call.node] = call

    def is_constant(self, argument: Any) -> bool:
        """Whether an argument is a tensor, or a number, that is known before the graph runs."""
        if isinstance(argument, Held):
            return argument.name in self._tensors and argument.name not in self.changed
        if isinstance(argument, fx.Node):
            if argument in self._held:
                return self._held[argument] not in self.changed
            return argument in self._calls
        return argument is not None

    def computed(self, node: fx.Node) -> Call | None:
        """The operation over constants that makes ``node``, if one does."""
        return self._calls.get(node)

    def name(self, argument: Any) -> str | None:
        """The name under which the graph holds ``argument``, if it does."""
        if isinstance(argument, Held):
            return argument.name if argument.name in self._tensors else None
        return self._held.get(argument) if isinstance(argument, fx.Node) else None

    def stored(self, argument: Any) -> Tensor:
        """A tensor that the graph holds, as it is stored."""
        name = self.name(argument)
        assert name is not None
        return self._tensors[name]

    def of_name(self, name: str) -> Tensor:
        """The tensor that the graph holds as ``name``."""
        return self._tensors[name]

    def tensor(self, argument: Any) -> Tensor:
        """A constant tensor: as it is stored, or computed in float64.

        Raises:
            UncomputableError: It has no numbers (the meta device), or computing it failed.
        """
        if self.name(argument) is not None:
            found = self.stored(argument)
        elif isinstance(argument, Tensor):
            found = argument
        elif isinstance(argument, fx.Node):
            found = self._evaluated(argument)
        else:
            found = torch.tensor(float(argument), dtype=torch.float64)
        if not isinstance(found, Tensor) or found.is_meta:
            raise UncomputableError("its tensor holds no numbers")
        return found

    def float64(self, argument: Any) -> NDArray[np.float64]:
        """A constant tensor or number in float64."""
        result: NDArray[np.float64] = self.tensor(argument).detach().double().cpu().numpy()
        return result

    def roots(self, argument: Any) -> tuple[str, ...]:
        """The names of all tensors of the graph that ``argument`` is computed from."""
        name = self.name(argument)
        if name is not None:
            return (name,)
        call = self.computed(argument) if isinstance(argument, fx.Node) else None
        if call is None:
            return ()
        return tuple(dict.fromkeys(r for node in call.nodes for r in self.roots(node)))

    def is_cast_on_the_way(self, node: fx.Node) -> bool:
        """Whether a cast is among the operations that compute ``node``."""
        call = self.computed(node)
        if call is None:
            return False
        return call.op in _CASTS or any(self.is_cast_on_the_way(n) for n in call.nodes)

    # ---- what is computed ----

    def _is_computed(self, call: Call) -> bool:
        if call.op in _CHANCE or call.mutates or call.op in _SIZES:
            return False
        if call.node in self._unsteady:
            return False
        if call.node.op == "call_module":
            return False
        nodes = call.nodes
        if not nodes:
            return call.op in _MADE
        return all(self.is_constant(node) for node in nodes)

    def _evaluated(self, node: fx.Node) -> Any:
        if node not in self._values:
            try:
                with torch.no_grad():
                    self._values[node] = self._run(self._calls[node])
            except UncomputableError:
                raise
            except Exception as error:
                reason = str(error).split("\n", 1)[0]
                raise UncomputableError(f"'{node.name}' can't be computed: {reason}") from error
        return self._values[node]

    def _run(self, call: Call) -> Any:
        node = call.node
        if call.op in _CASTS and _is_float_cast(call):
            return self._wide(call["input"])
        types = [self.of_name(name).dtype for name in self.roots(node)]
        number = _same if torch.float64 in types else _as_float32
        args = _mapped(node.args, self._wide, number)
        kwargs = _mapped(node.kwargs, self._wide, number)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _wide(self, node: Any) -> Any:
        if node in self._calls:
            return self._evaluated(node)
        found = self.tensor(node).detach()
        return found.double() if found.is_floating_point() else found


def _mapped(value: Any, of: Callable[[fx.Node], Any], number: Callable[[float], float]) -> Any:
    """``value`` with every node and every number with a point in it replaced."""
    if isinstance(value, fx.Node):
        return of(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, of, number) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(entry, of, number) for entry in value)
    return value


def _same(number: float) -> float:
    return number


def _as_float32(number: float) -> float:
    """What a number in code is beside tensors that are no doubles."""
    return float(np.float32(number))


def _is_float_cast(call: Call) -> bool:
    """Whether a cast leads to a float type; to where it stands is no matter."""
    dtype = call["dtype"]
    if call.op == "type_as" or isinstance(call["other"], fx.Node):
        return False
    return dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
