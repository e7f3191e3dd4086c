"""Edits of an fx.GraphModule; what it holds stands in its module tree, and nodes name it by paths.

    self.conv(x)                               call_module   "conv.weight" is the module's own
    F.conv2d(x, self.weight)                   get_attr      "weight" is an argument

One tensor may stand in several places of the tree (a module under two names, tied weights); what is
written to one of them is written to all.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from bnfold.planning import Merge
from bnfold.torch_bodies import Nest
from bnfold.torch_calls import Call
from bnfold.torch_graph_nodes import can_go, describe_node, set_argument, target_path
from bnfold.torch_graph_tree import Slot, Tree, copied, kept_kind, own, prune, slots, tensors_of

_RUNNING = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


class GraphEditor:
    """An `Editor` of a GraphModule.

    Args:
        graph_module: By ``symbolic_trace``, ``ExportedProgram.module()`` or by hand.
        inplace: Edit this very object; else a copy, which takes copies of the tensors that were
            not written when it is finished.
    """

    def __init__(self, graph_module: fx.GraphModule, inplace: bool = False) -> None:
        self._lent = {} if inplace else tensors_of(graph_module)
        self._root = graph_module if inplace else copied(graph_module, self._lent)
        self._modules = [m for m in self._root.modules() if isinstance(m, fx.GraphModule)]
        self._nest = Nest(self._root)
        self._dead = {node for node in self._nest.nodes() if not node.users}
        self._named = {target_path(n) for n in self._root.graph.nodes if target_path(n)}
        self._bypassed: dict[fx.Node, fx.Node] = {}
        self._left: set[fx.Node] = set()
        self._added: set[Slot] = set()
        self._tree = Tree(self._root)

    @property
    def edits_nodes(self) -> bool:
        """Whether nodes may be changed: always."""
        return True

    def module_of(self, call: Call) -> nn.Module | None:
        """The leaf module that ``call`` is a call of, if it is one."""
        return call.module

    @property
    def graph_module(self) -> fx.GraphModule:
        """The copy that is described and then edited; with ``inplace`` the given object."""
        return self._root

    @property
    def held(self) -> Mapping[fx.Node, str]:
        """The get_attr nodes of the outermost graph that give a tensor, with its path."""
        return self._tree.held

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor that a node reads or that a module it calls has, under each of its paths."""
        return self._tree.tensors

    def write(self, name: str, tensor: Tensor) -> None:
        """Let the tensor ``name`` be ``tensor``, wherever the same object stands in the tree."""
        old = self.tensors[name]
        self._tree.replace(old, kept_kind(old, tensor))
        if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            written = self.tensors[name]
            for node, held in self.held.items():
                if self.tensors[held] is written:
                    describe_node(node, written, node)

    def add(self, name: str, tensor: Tensor, like: str) -> str:
        """A new tensor of the kind of ``like`` at ``name``, or at a free name beside.

        Where nothing stood before, it is for nodes that read it: what is added to a leaf module
        that has no such attribute is swept if it only became another attribute's tensor.
        """
        name, slot, filled = self._tree.add(name, kept_kind(self.tensors[like], tensor), like)
        self._added |= set() if filled else {slot}
        return name

    def set_argument(self, node: fx.Node, argument: str, name: str) -> None:
        """Let ``node`` read the tensor ``name`` as ``argument``.

        ``node`` may stand in the body of a higher-order operator: the tensor is handed in then.
        """
        if node.op == "call_module":
            self._tree.tie(f"{node.target}.{argument}", name)
        else:
            set_argument(node, argument, self._reading(node, name))

    def bypass(self, value: fx.Node, data: fx.Node) -> None:
        """Whoever read ``value`` reads ``data``, or what ``data`` itself was bypassed by.

        ``data`` is of the same graph, or of the outermost one.
        """
        while data in self._bypassed:
            data = self._bypassed[data]
        data = data if data.graph is value.graph else self._nest.deliver(data, value.graph)
        value.replace_all_uses_with(data)
        self._bypassed[value] = data
        taken = value.args[0] if value.target is operator.getitem else value
        self._left |= {value, taken} if isinstance(taken, fx.Node) else {value}

    def discard(self, nodes: Iterable[fx.Node]) -> None:
        """Let ``nodes`` go as soon as nobody reads them, whatever they do."""
        self._left.update(nodes)

    def hold(self, merge: Merge, layer: nn.Module) -> None:
        """The modules of a graph are changed where they are."""
        raise NotImplementedError

    def sweep(self) -> None:
        """Remove the nodes that the edits left without a reader, and what only these named."""
        while self._sweep_nodes() or self._nest.cut(self._lost_its_readers):
            pass
        gone = self._named - {target_path(n) for n in self._root.graph.nodes}
        gone |= self._counters(gone)
        prune(self._root, gone)
        self._named -= gone
        for slot in self._added - self._tree.read():
            slot.clear()
        self._tree = Tree(self._root)
        for module in self._nest.modules:
            module.graph.lint()
        self._recompile()

    def _sweep_nodes(self) -> bool:
        found = [node for node in self._nest.nodes() if self._sweep_node(node)]
        return bool(found)

    def _sweep_node(self, node: fx.Node) -> bool:
        removable = not node.users and self._removable(node)
        if removable:
            self._nest.erase(node)
        return removable

    def _lost_its_readers(self, node: fx.Node) -> bool:
        return not node.users and node not in self._dead

    def finish(self) -> fx.GraphModule:
        """The edited GraphModule; without ``inplace`` it shares no tensor with the given one."""
        self._recompile()
        memo: dict[int, Any] = {}
        for slot, tensor in slots(self._root):
            if id(tensor) in self._lent:
                slot.put(own(tensor, memo))
        self._lent = {}
        self._tree = Tree(self._root)
        return self._root

    def _recompile(self) -> None:
        for module in self._modules:
            module.recompile()

    def _removable(self, node: fx.Node) -> bool:
        if node.op == "placeholder" or node.op == "output":
            return False
        if node in self._left or (node.target is operator.getitem and node.args[0] in self._left):
            return True
        return node not in self._dead and can_go(node)

    def _counters(self, gone: set[str]) -> set[str]:
        """What counted the batches of normalisations that are gone; no node need have read it."""
        owners = {path.rpartition(".")[0] for path in gone if path.endswith(_RUNNING)}
        counters = {f"{owner}.{_COUNTER}" if owner else _COUNTER for owner in owners}
        for node in list(self._root.graph.nodes):
            if node.op == "get_attr" and node.target in counters and not node.users:
                self._root.graph.erase_node(node)
        return counters

    def _reading(self, node: fx.Node, name: str) -> fx.Node:
        """A node before ``node``, of the same graph, that stands for the tensor ``name``."""
        if node.graph is not self._root.graph:
            first = next(iter(self._root.graph.nodes))  # before whatever runs the body
            return self._nest.deliver(self._reading(first, name), node.graph)
        for known, held in self.held.items():
            if held == name:
                if node < known:
                    node.prepend(known)
                return known
        with node.graph.inserting_before(node):
            new = node.graph.create_node("get_attr", name)
        self._named.add(name)
        self._tree.held[new] = name
        describe_node(new, self.tensors[name], node)
        return new
