"""Rewrites that change nothing that a model says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import onnx
from numpy.random import Generator
from onnx import helper

from tools.sabotage_graph import F64, Draft, Linear, all_nodes, copied, pick

Rewrite = Callable[[Draft, Generator], None]


def _constant_nodes(draft: Draft, _: Generator) -> None:
    held = [
        helper.make_node("Constant", [], [t.name], name=f"constant/{t.name}", value=t)
        for t in draft.graph.initializer
    ]
    del draft.graph.initializer[:]
    draft.reorder([*held, *draft.graph.node])


def _nodes_renamed(draft: Draft, _: Generator) -> None:
    for number, node in enumerate(all_nodes(draft.graph)):
        node.name = f"n{number}"


def _nodes_unnamed(draft: Draft, _: Generator) -> None:
    for node in all_nodes(draft.graph):
        node.name = ""


def _tensors_renamed(draft: Draft, _: Generator) -> None:
    """All but the graph's inputs and outputs; the names of subgraphs stay."""
    made = [t.name for t in draft.graph.initializer] + [
        n for k in draft.graph.node for n in k.output
    ]
    ends = draft.outputs() | {value.name for value in draft.graph.input} | {""}
    names = {name: f"t{i}" for i, name in enumerate(n for n in made if n not in ends)}
    for tensor in draft.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in all_nodes(draft.graph):
        node.input[:] = [names.get(name, name) for name in node.input]
    for node in draft.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]
    del draft.graph.value_info[:]


def _tensors_shuffled(draft: Draft, rng: Generator) -> None:
    """Every tensor has a name that another had: names mean nothing."""
    _tensors_renamed(draft, rng)
    ends = draft.outputs()
    made = [n for k in draft.graph.node for n in k.output if n and n not in ends]
    names = dict(zip(made, rng.permutation(made).tolist(), strict=True))
    for node in all_nodes(draft.graph):
        node.input[:] = [names.get(name, name) for name in node.input]
    for node in draft.graph.node:
        node.output[:] = [names.get(name, name) for name in node.output]


def _initializers_reversed(draft: Draft, _: Generator) -> None:
    held = [onnx.TensorProto.FromString(t.SerializeToString()) for t in draft.graph.initializer]
    del draft.graph.initializer[:]
    draft.graph.initializer.extend(reversed(held))


def _nodes_reordered(draft: Draft, rng: Generator) -> None:
    """Another order in which every node stands behind what it reads."""
    left = [copied(node) for node in draft.graph.node]
    made = {name for node in left for name in node.output}
    order: list[onnx.NodeProto] = []
    while left:
        ready = [node for node in left if not made & _reads(node)]
        node = pick(rng, ready)
        left.remove(node)
        made -= set(node.output)
        order.append(node)
    draft.reorder(order)


def _reads(node: onnx.NodeProto) -> set[str]:
    inner = (n for a in node.attribute for n in all_nodes(a.g))
    return {*node.input, *(name for other in inner for name in other.input)}


def _identities(draft: Draft, rng: Generator) -> None:
    """Identity behind three nodes."""
    for number in range(3):
        node = pick(rng, draft.inner("Conv", "Gemm", "MatMul", "Relu", "Add", "Concat"))
        made, place = node.output[0], draft.index(node)
        draft.redirect(made, f"identity.{number}")
        identity = helper.make_node("Identity", [made], [f"identity.{number}"], f"identity{number}")
        nodes = [*draft.graph.node]
        draft.reorder([*nodes[: place + 1], identity, *nodes[place + 1 :]])


def _dead_branch(draft: Draft, rng: Generator) -> None:
    node = pick(rng, draft.inner("Conv", "Gemm", "MatMul", "Relu", "Add"))
    draft.graph.node.append(helper.make_node("Tanh", [node.output[0]], ["dead"], "dead"))


def _gemm_turned(draft: Draft, rng: Generator) -> None:
    """A weight stored the other way round."""
    site = pick(rng, [linear for linear in draft.linears() if linear.node.op_type == "Gemm"])
    turned = np.ascontiguousarray(draft.array(site.weight).T)
    other = int(site.out_axis == 1)
    kept = [a for a in site.node.attribute if a.name != "transB"]
    attributes = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept]
    del site.node.attribute[:]
    site.node.attribute.extend([*attributes, helper.make_attribute("transB", other)])
    draft.store(site.weight, turned)


def _bias_as_add(draft: Draft, rng: Generator) -> None:
    """A Conv without its bias, and an Add of it."""
    kinds = ("Conv", "ConvTranspose")
    sites = [n for n in draft.inner(*kinds) if len(n.input) > 2 and draft.holds(n.input[2])]
    node = pick(rng, sites)
    made, place, name = node.output[0], draft.index(node), "rewritten.bias"
    spatial = draft.array(node.input[1]).ndim - 2
    draft.store(name, draft.array(node.input[2]).reshape(-1, *(1,) * spatial))
    del node.input[2]
    draft.redirect(made, "rewritten.sum")
    add = helper.make_node("Add", [made, name], ["rewritten.sum"], "rewritten")
    nodes = [*draft.graph.node]
    draft.reorder([*nodes[: place + 1], add, *nodes[place + 1 :]])


def _chain(draft: Draft, rng: Generator) -> tuple[Linear, Linear]:
    """Two operators of which one reads the other's output, with at most a Relu between them."""
    reads, makers = draft.readers(), draft.makers()
    found = {linear.node.output[0]: linear for linear in draft.linears() if linear.groups == 1}
    chains = []
    for after in found.values():
        name = after.node.input[0]
        if name in makers and makers[name].op_type == "Relu" and reads[name] == 1:
            name = makers[name].input[0]
        before = found.get(name)
        if before and reads[name] == 1 and before.node.op_type == after.node.op_type:
            chains.append((before, after))
    return pick(rng, chains)


def _in_other_units(draft: Draft, rng: Generator) -> None:
    """Channels between two operators are stored 2, 4 ... times as large, which is exact."""
    before, after = _chain(draft, rng)
    count = draft.array(before.weight).shape[before.out_axis]
    factors = 2.0 ** rng.integers(-3, 4, count)
    _along(draft, before.weight, before.out_axis, lambda rows: rows * factors)
    _along(draft, after.weight, after.in_axis, lambda rows: rows / factors)
    if before.bias:
        shape = draft.array(before.bias).shape
        draft.store(before.bias, (draft.array(before.bias).ravel() * factors).reshape(shape))


def _permuted(draft: Draft, rng: Generator) -> None:
    """Channels between two operators stand in another order."""
    before, after = _chain(draft, rng)
    order = rng.permutation(draft.array(before.weight).shape[before.out_axis])
    _along(draft, before.weight, before.out_axis, lambda rows: rows[..., order])
    _along(draft, after.weight, after.in_axis, lambda rows: rows[..., order])
    if before.bias:
        shape = draft.array(before.bias).shape
        draft.store(before.bias, draft.array(before.bias).ravel()[order].reshape(shape))


def _along(draft: Draft, name: str, axis: int, change: Callable[[F64], F64]) -> None:
    turned = np.moveaxis(draft.array(name), axis, -1)
    draft.store(name, np.moveaxis(change(turned), -1, axis))


REWRITES: Mapping[str, Rewrite] = MappingProxyType(
    {
        "constants-as-nodes": _constant_nodes,
        "nodes-renamed": _nodes_renamed,
        "nodes-unnamed": _nodes_unnamed,
        "tensors-renamed": _tensors_renamed,
        "tensors-shuffled": _tensors_shuffled,
        "initializers-reversed": _initializers_reversed,
        "nodes-reordered": _nodes_reordered,
        "identity-inserted": _identities,
        "dead-branch-added": _dead_branch,
        "gemm-turned": _gemm_turned,
        "bias-as-add": _bias_as_add,
    }
)
# The same function, but no fold: tensors of one name hold other numbers.
HARD_REWRITES: Mapping[str, Rewrite] = MappingProxyType(
    {
        "in-other-units": _in_other_units,
        "channels-permuted": _permuted,
    }
)
