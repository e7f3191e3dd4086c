"""Graphs that share modules and tensors with a user's module, put together without writing there.

The constructor of fx.GraphModule registers what nodes name wherever it belongs, and where that is
inside a shared module, that is written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn


def alone(whole: nn.Module, path: str) -> fx.GraphModule:
    """One call of the submodule at ``path``, and nothing else."""
    module, graph = whole.get_submodule(path), fx.Graph()
    graph.output(graph.call_module(path, (graph.placeholder("input"),)))
    return assembled(graph, {path: module}, type(module).__name__, module.training)


def attributes_of(graph: fx.GraphModule) -> list[tuple[str, Tensor]]:
    """The tensors that get_attr nodes stand for, with their names."""
    split = [(name, name.rpartition(".")) for name in targets(graph.graph, "get_attr")]
    held = [(name, getattr(graph.get_submodule(path), last)) for name, (path, _, last) in split]
    return [(name, tensor) for name, tensor in held if isinstance(tensor, Tensor)]


def targets(graph: fx.Graph, op: str) -> list[str]:
    """What the nodes of one kind name, each once."""
    return list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == op))


def assembled(
    graph: fx.Graph, held: Mapping[str, Any], name: str, training: bool
) -> fx.GraphModule:
    """A GraphModule that shares what it holds; the constructor would write into shared modules."""
    found = fx.GraphModule(nn.Module(), fx.Graph(), name)
    for path in held:  # modules first: what stands in one is there already
        _put(found, path, held)
    found.training = training
    found.graph = graph
    return found


def _put(root: nn.Module, path: str, held: Mapping[str, Any]) -> None:
    owner = root
    *above, attribute = path.split(".")
    for depth, atom in enumerate(above, start=1):
        if isinstance(held.get(".".join(above[:depth])), nn.Module):
            return
        owner = owner._modules.setdefault(atom, nn.Module())  # type: ignore[assignment]
    value = held[path]
    if isinstance(value, nn.Module):
        owner._modules[attribute] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[attribute] = value
    else:
        owner._buffers[attribute] = value
