"""Who else reads the tensors that one part of a module reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import fx, nn

from bnfold.torch_assembly import attributes_of, targets
from bnfold.torch_guard import join, names_of, storage_of
from bnfold.torch_tracer import is_of_torch

_Reads = dict[int, str]


def outside_readers(
    whole: nn.Module, graphs: Mapping[str, fx.GraphModule]
) -> Mapping[str, Mapping[int, tuple[str, ...]]]:
    """For each part, by path: its storages that have names outside of it, and these names."""
    reads = {path: _reads(graph) for path, graph in graphs.items()}
    return {path: _outside(whole, path, graph, reads) for path, graph in graphs.items()}


def opaque_leaves(graph: fx.GraphModule) -> list[tuple[str, nn.Module]]:
    """Leaves of a trace that are not of torch: somebody watches them, but not what is inside."""
    leaves = [(name, graph.get_submodule(name)) for name in targets(graph.graph, "call_module")]
    return [(name, leaf) for name, leaf in leaves if not is_of_torch(leaf)]


def _outside(
    whole: nn.Module, part: str, graph: fx.GraphModule, reads: Mapping[str, _Reads]
) -> Mapping[int, tuple[str, ...]]:
    opaque = [leaf for _, leaf in opaque_leaves(graph)]
    if not part and not opaque:
        return {}
    found: dict[int, list[str]] = defaultdict(list)
    root = whole.get_submodule(part)
    for trail, path, attribute, tensor in names_of(whole):
        inside = root in trail and not any(leaf in trail for leaf in opaque)
        if not inside and storage_of(tensor) in reads[part]:
            found[storage_of(tensor)].append(join(path, attribute))
    for storage, name in _elsewhere(part, reads):
        found[storage].append(name)
    return {storage: tuple(dict.fromkeys(names)) for storage, names in found.items()}


def _elsewhere(part: str, reads: Mapping[str, _Reads]) -> list[tuple[int, str]]:
    others = [reads[path] for path in reads if path != part]
    return [(s, name) for other in others for s, name in other.items() if s in reads[part]]


def _reads(graph: fx.GraphModule) -> _Reads:
    """What the nodes of a part read by themselves, and not some leaf that nobody knows."""
    found: _Reads = {}
    for name, tensor in attributes_of(graph):
        found.setdefault(storage_of(tensor), name)
    for name in targets(graph.graph, "call_module"):
        leaf = graph.get_submodule(name)
        for _, path, attribute, tensor in names_of(leaf) if is_of_torch(leaf) else ():
            found.setdefault(storage_of(tensor), join(name, path, attribute))
    return found
