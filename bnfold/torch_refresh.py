"""What a graph says of its values, worked out again from what it says of its inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from bnfold.errors import UsageError
from bnfold.torch_bodies import bodies, operands, placeholders


def refresh(module: fx.GraphModule) -> None:
    """Let ``meta["val"]`` of every node follow from that of the placeholders.

    Bodies of higher-order operators are gone through where all their inputs are known.

    Raises:
        UsageError: An operator does not take what it would be given.
    """
    inputs = [node.meta["val"] for node in placeholders(module)]
    mode = next((m for m in (getattr(v, "fake_mode", None) for v in inputs) if m is not None), None)
    if mode is None:
        return
    with mode:
        _Propagation(module).run(*inputs)


_MOVES = frozenset({"t", "transpose", "permute", "numpy_T", "detach", "alias", "clone", "_to_copy"})


def restate_moves(node: fx.Node) -> None:
    """Let what only arranges the tensor ``node`` otherwise follow from what is said of that."""
    for user in node.users:
        target = user.target
        if isinstance(target, OpOverload) and target._opname in _MOVES and "val" in user.meta:
            args = fx.node.map_arg(user.args, lambda n: n.meta["val"])
            user.meta["val"] = target(*args, **user.kwargs)
            user.meta.pop("tensor_meta", None)
            restate_moves(user)


class _Propagation(fx.Interpreter):
    """Runs a graph on values without data, and notes them."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # or fx would write its own text into our error

    def run_node(self, n: fx.Node) -> Any:
        for body in bodies(n):
            self._enter(n, body)
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever an operator raises where shapes don't fit
            met = f"the new shapes or types do not fit: {error}"
            raise UsageError(met, node=n.name, todo="rewrite all tensors that depend") from error
        if n.op == "call_function" and "val" in n.meta:
            n.meta["val"] = value
            n.meta.pop("tensor_meta", None)
        return value

    def _enter(self, node: fx.Node, body: fx.GraphModule) -> None:
        handed = operands(node)
        inputs = placeholders(body)
        if len(handed) != len(inputs):
            return
        values = [self.env[each] if isinstance(each, fx.Node) else each for each in handed]
        for placeholder, value in zip(inputs, values, strict=True):
            placeholder.meta["val"] = value
            if isinstance(value, Tensor):
                placeholder.meta.pop("tensor_meta", None)
        _Propagation(body).run(*values)
