"""The module tree of a GraphModule: the tensors in it by all of their names, copies, pruning."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfold.torch_graph_nodes import target_path


def _stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps tensors: parameters, buffers, plain attributes."""
    return module._parameters, module._buffers, module.__dict__


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the tree."""

    owner: nn.Module
    attribute: str

    @property
    def store(self) -> dict[str, Any]:
        """What the attribute stands in, if anything."""
        return next((s for s in _stores(self.owner) if self.attribute in s), {})

    @property
    def tensor(self) -> Tensor | None:
        """What stands there, if it is a tensor."""
        found = self.store.get(self.attribute)
        return found if isinstance(found, Tensor) else None

    def put(self, tensor: Tensor) -> None:
        """Let ``tensor`` stand there instead, of the same kind."""
        self.store[self.attribute] = tensor

    def fill(self, tensor: Tensor, like: Slot) -> None:
        """Let ``tensor`` stand there, held as ``like`` is; there may be nothing yet, or None."""
        kind = next(k for k, s in enumerate(_stores(like.owner)) if like.attribute in s)
        for number, store in enumerate(_stores(self.owner)):
            if number != kind:
                store.pop(self.attribute, None)
        _stores(self.owner)[kind][self.attribute] = tensor
        if like.attribute in like.owner._non_persistent_buffers_set:
            self.owner._non_persistent_buffers_set.add(self.attribute)

    def clear(self) -> None:
        """Let nothing stand there, neither tensor nor module."""
        for store in (*_stores(self.owner), self.owner._modules):
            store.pop(self.attribute, None)
        self.owner._non_persistent_buffers_set.discard(self.attribute)


class Tree:
    """The tensors of a GraphModule by all of their names."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.root = root
        self.tensors: dict[str, Tensor] = {}
        self.held: dict[fx.Node, str] = {}
        self._slots: dict[str, Slot] = {}
        self._names: defaultdict[Slot, list[str]] = defaultdict(list)
        self._paths: defaultdict[nn.Module, list[str]] = defaultdict(list)
        self._places: defaultdict[int, list[Slot]] = defaultdict(list)
        for slot, tensor in slots(root):
            self._places[id(tensor)].append(slot)
        for node in root.graph.nodes:
            if node.op == "get_attr":
                self._attribute(node)
            elif node.op == "call_module":
                self._module(target_path(node))

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Let ``new`` stand wherever ``old`` does."""
        for slot in self._places.pop(id(old)):
            slot.put(new)
            self._placed(slot, new)

    def read(self) -> set[Slot]:
        """The places that nodes of the graph read."""
        return {self._slots[name] for name in self.held.values()}

    def add(self, name: str, tensor: Tensor, like: str) -> tuple[str, Slot, bool]:
        """Let ``tensor`` stand at ``name``, or at a free name beside; beside ``like`` at worst.

        Returns:
            Its name, its place, and whether None stood there.
        """
        source = self._slots[like]
        path, _, attribute = name.rpartition(".")
        owner = _submodule(self.root, path)
        if owner is None:
            path, owner = like.rpartition(".")[0], source.owner
        slot = Slot(owner, _free(owner, attribute))
        filled = hasattr(owner, slot.attribute)
        self._fill(slot, tensor, source, path)
        return _join(path, slot.attribute), slot, filled

    def tie(self, name: str, source: str) -> None:
        """Let the tensor ``source`` stand at ``name`` too."""
        path, _, attribute = name.rpartition(".")
        slot = Slot(self.root.get_submodule(path), attribute)
        old, new = slot.tensor, self.tensors[source]
        if old is new:
            return
        if old is not None:
            self._places[id(old)].remove(slot)
        self._fill(slot, new, self._slots[source], path)

    def _fill(self, slot: Slot, tensor: Tensor, like: Slot, path: str) -> None:
        slot.fill(tensor, like)
        for known in {path: None} | dict.fromkeys(self._paths[slot.owner]):
            self._know(_join(known, slot.attribute), slot)
        self._placed(slot, tensor)

    def _placed(self, slot: Slot, tensor: Tensor) -> None:
        self._places[id(tensor)].append(slot)
        for name in self._names[slot]:
            self.tensors[name] = tensor

    def _know(self, name: str, slot: Slot) -> None:
        tensor = slot.tensor
        if name not in self._slots and tensor is not None:
            self._slots[name], self.tensors[name] = slot, tensor
            self._names[slot].append(name)

    def _attribute(self, node: fx.Node) -> None:
        path, _, attribute = target_path(node).rpartition(".")
        owner = _submodule(self.root, path)
        if owner is not None and Slot(owner, attribute).tensor is not None:
            self._paths[owner].append(path)
            self._know(target_path(node), Slot(owner, attribute))
            self.held[node] = target_path(node)

    def _module(self, target: str) -> None:
        called = self.root.get_submodule(target)
        for path, module in called.named_modules(prefix=target, remove_duplicate=False):
            self._paths[module].append(path)
            for attribute in (*module._parameters, *module._buffers):
                self._know(f"{path}.{attribute}", Slot(module, attribute))


def slots(root: nn.Module) -> Iterator[tuple[Slot, Tensor]]:
    """Every place in the tree where a tensor stands."""
    for module in root.modules():
        for store in _stores(module):
            for attribute, value in list(store.items()):
                if isinstance(value, Tensor):
                    yield Slot(module, attribute), value


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _free(owner: nn.Module, attribute: str) -> str:
    """``attribute`` if nothing stands there, or None does; else with a number behind."""

    def taken(name: str) -> bool:
        return hasattr(type(owner), name) or getattr(owner, name, None) is not None

    numbered = (f"{attribute}_{number}" for number in itertools.count(1))
    return next(name for name in itertools.chain([attribute], numbered) if not taken(name))


def kept_kind(old: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` as a parameter if ``old`` is one, trained if ``old`` is."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    return tensor.detach().requires_grad_(old.requires_grad)


# ---- copies ----


def tensors_of(root: nn.Module) -> dict[int, Tensor]:
    """Every tensor in the tree, by its identity."""
    return {id(tensor): tensor for _, tensor in slots(root)}


def copied(root: fx.GraphModule, lent: Mapping[int, Tensor]) -> fx.GraphModule:
    """A copy that holds the tensors ``lent`` themselves, and everything else of its own.

    deepcopy of a GraphModule is not enough: it loses hooks and attributes, and makes persistent
    buffers of tensors that are none.
    """
    memo: dict[int, Any] = dict(lent)
    shells: dict[fx.GraphModule, fx.GraphModule] = {}
    for module in root.modules():
        memo |= {id(v): v for v in module.__dict__.values() if isinstance(v, torch.ScriptObject)}
        if isinstance(module, fx.GraphModule):
            lent_too = (module.shape_env, *module.meta.values())
            memo |= {id(v): v for v in lent_too if not isinstance(v, nn.Module)}
            shells[module] = memo[id(module)] = type(module).__new__(type(module))
    for module, shell in shells.items():
        type(shell).__name__ = type(module).__name__
        with warnings.catch_warnings():  # torch warns of how it copies its own tree specifications
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            shell.__dict__.update(copy.deepcopy(module.__dict__, memo))
    for module, shell in reversed(shells.items()):
        graph = shell.__dict__["_graph"]
        for node, twin in zip(module.graph.nodes, graph.nodes, strict=True):
            twin.name = node.name  # torch.export names an input as the user did, fx might not
        shell.graph = graph  # which takes it for its own, and compiles it
    return shells[root]


def own(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy of ``tensor``, one for all places where it stands."""
    if not tensor.is_leaf and id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone()
    copied: Tensor = copy.deepcopy(tensor, memo)
    return copied


# ---- what no node names any more ----


def prune(root: fx.GraphModule, gone: set[str]) -> None:
    """Delete what stands at the paths ``gone``, and the containers that this leaves empty."""
    used, called = _in_use(root)
    for path in sorted(gone):
        while path:
            parent, _, attribute = path.rpartition(".")
            owner = _submodule(root, parent)
            if owner is None or owner in called or Slot(owner, attribute) in used:
                break
            Slot(owner, attribute).clear()
            path = parent if _is_empty(owner) else ""


def _in_use(root: fx.GraphModule) -> tuple[set[Slot], set[nn.Module]]:
    """The places that nodes name or pass, and the modules of which everything is in use."""
    used: set[Slot] = set()
    called: set[nn.Module] = set()
    for path in {target_path(node) for node in root.graph.nodes} - {""}:
        reached: Any = root
        for atom in path.split("."):
            used.add(Slot(reached, atom))
            reached = getattr(reached, atom, None)
            if not isinstance(reached, nn.Module):
                break
        else:
            called.update(reached.modules())
    return used, called


_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_empty(module: nn.Module) -> bool:
    if type(module) not in _CONTAINERS or module._modules:
        return False
    held = [value for store in _stores(module) for value in store.values()]
    return not any(isinstance(value, Tensor | torch.ScriptObject) for value in held)
