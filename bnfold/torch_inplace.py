"""Which tensors are changed in place while somebody still reads what they were.

An in-place operation is like any other as long as nobody reads the tensor that it changes, nor a
view of it, by an earlier name afterwards. Where somebody does, all names of that tensor have to
stay in true units: which of them stands for which values depends on the order of things.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import getitem

import torch
from torch import fx

from bnfold.torch_calls import Call

# Operations whose result may be the tensor that they read, or a view of it.
_VIEWS = frozenset({
    "alias", "as_strided", "chunk", "contiguous", "detach", "diagonal", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "expand", "expand_as", "feature_dropout", "flatten", "float",
    "double", "half", "bfloat16", "getitem", "moveaxis", "movedim", "mT", "narrow", "numpy_T",
    "permute", "positive", "ravel", "real", "reshape", "reshape_as", "select", "slice", "split",
    "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose",
    "type_as", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split", "unsqueeze",
    "view", "view_as", "Identity", "getattr", "hsplit", "vsplit", "dsplit", "pad", "interpolate",
})  # fmt: skip


@dataclass(slots=True)
class Aliases:
    """Nodes that may be the same memory, as classes that grow in the order of the graph."""

    _leader: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _members: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def members(self, node: fx.Node) -> list[fx.Node]:
        """All nodes so far that may be the memory of ``node``, itself among them."""
        return self._members.get(self._leader.get(node, node), [node])

    def join(self, node: fx.Node, other: fx.Node) -> None:
        """``node`` may be the memory of ``other``."""
        first, second = self._leader.get(other, other), self._leader.get(node, node)
        if first is second:
            return
        moved = self._members.pop(second, [second])
        self._members.setdefault(first, [first]).extend(moved)
        self._leader.update(dict.fromkeys(moved, first))


@dataclass(frozen=True, slots=True)
class Conflict:
    """``call`` changes a tensor that others still read.

    ``nodes`` are all names of the tensor, ``late`` those by which it is still read, or known
    outside.
    """

    call: Call
    nodes: tuple[fx.Node, ...]
    late: tuple[fx.Node, ...]


def conflicts(
    calls: Iterable[Call],
    inputs: Iterable[fx.Node],
    outputs: Iterable[fx.Node],
    gone: Mapping[fx.Node, fx.Node] | None = None,
) -> list[Conflict]:
    """The in-place operations that change what others still read.

    Args:
        calls: All operations, in order.
        inputs: What is handed to the graph: somebody outside may read it.
        outputs: What somebody outside reads in the end.
        gone: Steps that vanished, and what stands for their output now.
    """
    listed = list(calls)
    gone = gone or {}
    last = _last_reads(listed, outputs)
    given = set(inputs)
    aliases = Aliases()
    found = []
    for place, call in enumerate(listed):
        source = gone.get(call.node)
        if source is not None:
            aliases.join(call.node, source)
            continue
        for read in shared(call):
            aliases.join(call.node, read)
        target = call[call.mutates] if call.mutates else None
        if not isinstance(target, fx.Node):
            continue
        names = [node for node in aliases.members(target) if node is not call.node]
        late = [n for n in names if last.get(n, -1) > place or n in given]
        if late:
            found.append(Conflict(call, (*names, call.node), tuple(late)))
        aliases.join(call.node, target)
    return found


def _last_reads(calls: list[Call], outputs: Iterable[fx.Node]) -> dict[fx.Node, int]:
    last = {node: place for place, call in enumerate(calls) for node in call.nodes}
    return last | dict.fromkeys(outputs, len(calls))


def changed(calls: Iterable[Call]) -> set[fx.Node]:
    """All names of all tensors that are changed in place."""
    aliases = Aliases()
    targets = []
    for call in calls:
        for read in shared(call):
            aliases.join(call.node, read)
        target = call[call.mutates] if call.mutates else None
        if isinstance(target, fx.Node):
            targets.append(target)
    return {node for target in targets for node in aliases.members(target)}


def shared(call: Call) -> Iterable[fx.Node]:
    """The arguments that the result may share its memory with."""
    if call.mutates:
        target = call[call.mutates]
        return (target,) if isinstance(target, fx.Node) else ()
    overload = call.node.target
    if isinstance(overload, torch._ops.OpOverload):
        named = [p.name for p in overload._schema.arguments if p.alias_info is not None]
        lent = [call["input" if name == "self" else name] for name in named]
        nodes = [node for node in lent if isinstance(node, fx.Node)]
        return nodes or (call.nodes if call.op in _VIEWS else ())
    return call.nodes if overload is getitem or call.op in _VIEWS else ()
