"""Every operation of a torch graph in order, with what bodies of higher-order operators do.

A body that always runs (``torch.no_grad``, ``torch.autocast`` inside a forward) is read as if it
stood where it is called. A body of ``torch.cond`` runs or not: it is a graph of its own, whose
inputs and outputs are fixed, and that holds the constants which are handed to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem

from torch import fx

from bnfold.torch_calls import Call, as_call

_ALWAYS = {"wrap_with_set_grad_enabled": 2, "wrap_with_autocast": 5}  # operands begin behind these
_CHOICE = "cond"


@dataclass(slots=True)
class Walk:
    """All operations of a graph and of the bodies that can be looked into.

    Attributes:
        calls: In the order in which they run.
        inputs: Placeholders that stand for no other node: of the graph, and of bodies that are
            graphs of their own.
        outputs: Nodes that somebody outside such a graph reads.
        captured: Nodes that are handed to such a body.
        held: Nodes that stand for tensors that the graph holds.
        same: For a node that stands for another one, that one.
        entered: Nodes that call bodies which are graphs of their own, and were gone into.
    """

    calls: list[Call] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    captured: list[fx.Node] = field(default_factory=list)
    held: tuple[fx.Node, ...] = ()
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)
    entered: set[fx.Node] = field(default_factory=set)

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node that ``node`` stands for."""
        while node in self.same:
            node = self.same[node]
        return node


def walk(graph_module: fx.GraphModule, held: Mapping[fx.Node, str]) -> Walk:
    """Go through ``graph_module``; ``held`` are its nodes that stand for tensors it holds."""
    found = Walk(held=tuple(held))
    _graph(found, graph_module, held)
    return found


def _graph(found: Walk, graph_module: fx.GraphModule, held: Mapping[fx.Node, str]) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            if node not in found.same and node not in held:
                found.inputs.append(node)
        elif node.op == "output":
            found.outputs += [found.resolve(n) for n in node.all_input_nodes]
        elif node.op != "get_attr":
            _node(found, graph_module, node, held)


def _node(
    found: Walk, graph_module: fx.GraphModule, node: fx.Node, held: Mapping[fx.Node, str]
) -> None:
    name = getattr(node.target, "__name__", "")
    if name in _ALWAYS and _body(graph_module, node, _ALWAYS[name] - 1) is not None:
        _inline(found, graph_module, node, _ALWAYS[name], held)
        return
    if name == _CHOICE and _choices(graph_module, node):
        _choose(found, graph_module, node, held)
        return
    if node in found.same:  # it only takes an output of a body that was read in place
        return
    found.calls.append(as_call(node, found.resolve))


def _body(graph_module: fx.GraphModule, node: fx.Node, position: int) -> fx.GraphModule | None:
    argument = node.args[position] if position < len(node.args) else None
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    body = getattr(graph_module, str(argument.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _inline(
    found: Walk, outer: fx.GraphModule, node: fx.Node, first: int, held: Mapping[fx.Node, str]
) -> None:
    body = _body(outer, node, first - 1)
    assert body is not None
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    for placeholder, operand in zip(placeholders, node.args[first:], strict=True):
        if isinstance(operand, fx.Node):
            found.same[placeholder] = found.resolve(operand)
    for inner in body.graph.nodes:
        if inner.op not in ("placeholder", "output", "get_attr"):
            _node(found, body, inner, held)
    made = body.graph.output_node().args[0]
    results = made if isinstance(made, list | tuple) else (made,)
    for user in node.users:
        if user.op == "call_function" and len(user.args) == 2 and isinstance(user.args[1], int):
            result = results[user.args[1]]
            if isinstance(result, fx.Node):
                found.same[user] = found.resolve(result)


def _choices(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    bodies = [_body(graph_module, node, position) for position in (1, 2)]
    return [body for body in bodies if body is not None] if None not in bodies else []


def _choose(found: Walk, outer: fx.GraphModule, node: fx.Node, held: Mapping[fx.Node, str]) -> None:
    operands = node.args[3] if len(node.args) > 3 else ()
    assert isinstance(operands, list | tuple)
    read = [found.resolve(n) for n in operands if isinstance(n, fx.Node)]
    for body in _choices(outer, node):
        placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
        for placeholder, operand in zip(placeholders, operands, strict=True):
            if isinstance(operand, fx.Node) and found.resolve(operand) in held:
                found.same[placeholder] = found.resolve(operand)
        _graph(found, body, held)
    found.captured += [n for n in read if n not in held]
    found.entered.add(node)
    found.calls.append(as_call(node, found.resolve))


# Operations that give several tensors, which are taken apart by their position.
_SEVERAL = frozenset({
    "chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split", "unbind",
    "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_batch_norm",
    "_native_batch_norm_legit_functional", "_batch_norm_no_update", "_batch_norm_with_update",
    "native_layer_norm", "native_group_norm", "_fused_rms_norm", "max_pool2d_with_indices",
    "max_pool1d_with_indices", "max_pool3d_with_indices", "native_dropout", "var_mean", "topk",
    "sort",
})  # fmt: skip


_WITH_PLACES = frozenset({"max", "min", "median", "nanmedian", "mode", "cummax", "cummin",
                          "kthvalue"})  # fmt: skip


def parts(call: Call) -> dict[int, fx.Node] | None:
    """The nodes that take one of several outputs of ``call``, by position.

    None when it gives a single tensor, or when somebody takes all of its outputs at once.
    """
    value = call.node.meta.get("val")
    with_places = call.op in _WITH_PLACES and isinstance(call["dim"], int)
    known = call.op in _SEVERAL or with_places
    several = isinstance(value, list | tuple) if value is not None else known
    if not several:
        return None
    found: dict[int, fx.Node] = {}
    for user in call.node.users:
        taken = user.args[1] if len(user.args) == 2 else None
        if user.target is not getitem or not isinstance(taken, int) or taken in found:
            return None
        found[taken] = user
    return found
