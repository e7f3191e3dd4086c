"""The editor of a module tree: what was decided on a graph of it, under the user's own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from bnfold.planning import Merge
from bnfold.torch_calls import Call
from bnfold.torch_capture import Captured
from bnfold.torch_chain import sequential
from bnfold.torch_reparam import materialise
from bnfold.torch_tree import ModuleTree


class ModuleEditor:
    """An `Editor` that writes into a module tree what was decided on a graph of it.

    Args:
        root: The module; it is changed.
        captured: A graph of it, or of a part of it.
    """

    edits_nodes = False

    def __init__(self, root: nn.Module, captured: Captured) -> None:
        self._root = root
        graph_module, self._held, self._tensors = _graph_of(captured)
        self._graph_module = graph_module
        self._pending: dict[str, tuple[Tensor, str]] = {}
        self._vanished: set[fx.Node] = set()
        self._instead: dict[fx.Node, nn.Module] = {}
        self._layers: dict[int, nn.Module] = {}
        self.tree: ModuleTree | None = None

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph that was captured."""
        return self._graph_module

    @property
    def held(self) -> Mapping[fx.Node, str]:
        """The nodes that stand for tensors of the module, with their names."""
        return self._held

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that the graph reads."""
        return self._tensors

    def write(self, name: str, tensor: Tensor) -> None:
        """Let the tensor ``name`` be ``tensor``, in all modules that hold the same one."""
        path, _, attribute = name.rpartition(".")
        module = self._root.get_submodule(path)
        materialise(module, attribute)
        old = getattr(module, attribute)
        new = _of_kind(tensor, old)
        for other in self._root.modules():
            if isinstance(other, torch.jit.ScriptModule):
                continue
            stores: tuple[dict[str, Any], ...] = (other._parameters, other._buffers, vars(other))
            for store in stores:
                for key in [key for key, value in store.items() if value is old]:
                    store[key] = new
        self._tensors = {**self._tensors, name: new}

    def add(self, name: str, tensor: Tensor, like: str) -> str:
        """Keep ``tensor`` until it is known which module reads it."""
        key = f"{name}#{len(self._pending)}"
        self._pending[key] = (tensor, like)
        return key

    def set_argument(self, node: fx.Node, argument: str, name: str) -> None:
        """Let the module in whose code ``node`` is written hold the tensor as ``argument``."""
        assert self.tree is not None
        tensor, like = self._pending[name]
        call = self.tree.facts.call_of(node)
        assert call is not None
        module = self.tree.at(call)
        materialise(module, argument)
        old = getattr(module, argument, None)
        old = old if isinstance(old, Tensor) else self._tensors[like]
        if argument in module._buffers:
            module._buffers[argument] = tensor
        else:
            module.register_parameter(argument, nn.Parameter(tensor, old.requires_grad))
        if argument == "weight" and isinstance(module, _NormBase | nn.GroupNorm):
            module.affine = True
        if argument == "weight" and isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.elementwise_affine = True

    def bypass(self, value: fx.Node, data: fx.Node) -> None:
        """Note that the step whose output is ``value`` vanished."""
        del data
        source = value.args[0] if getattr(value.target, "__name__", "") == "getitem" else value
        self._vanished.update(n for n in (value, source) if isinstance(n, fx.Node))

    def replace(self, step: fx.Node, module: nn.Module) -> None:
        """Let ``module`` do in the place of another what ``step`` does there."""
        self._instead[step] = module

    def discard(self, nodes: Iterable[fx.Node]) -> None:
        """Nodes stay: they only prove what the modules do."""

    def hold(self, merge: Merge, layer: nn.Module) -> None:
        """Let ``layer`` do what all of ``merge`` did, where the tree found room for it."""
        self._layers[merge.root] = layer

    def sweep(self) -> None:
        """Put Identity, or what is left of them, in the place of modules that are done with."""
        assert self.tree is not None
        for path, removal in self.tree.removals.items():
            new = [self._instead[step] for step in removal.steps if step in self._instead]
            if new or removal.steps <= self._vanished:
                old = self.tree.module(path)
                left = [self.tree.module(inner) for inner in removal.left]
                for module in new:
                    module.train(old.training)
                self._replace(old, _in_place_of(old, [*new, *left]))
        self._place_layers()

    def _place_layers(self) -> None:
        """Put the layers of merges where the tree found room for them, innermost modules first."""
        assert self.tree is not None
        layers = self._layers
        for line in self.tree.hosts.lines if layers else ():
            for path in line.gone:
                self._put(path, nn.Identity())
            self._put(line.into, layers[line.root])
        chains = self.tree.hosts.chains.values() if layers else ()
        for chain in sorted(chains, key=lambda chain: -chain.path.count(".")):
            parts = {
                part.name: self._root.get_submodule(part.path) if part.path else layers[part.root]
                for part in chain.parts
            }
            for part in chain.parts:
                if not part.path:
                    layers[part.root].training = self._root.get_submodule(chain.path).training
            self._put(chain.path, sequential(parts))

    def _put(self, path: str, new: nn.Module) -> None:
        """Let ``new`` be at ``path``, in the mode of what was there."""
        old = self._root.get_submodule(path)
        new.training = old.training
        self._replace(old, new)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Let ``old`` itself be ``new``: lists and whoever else holds it need not be found."""
        try:
            old.__class__ = type(new)
        except TypeError:  # its class has a layout of its own
            self._replace_in_tree(old, new)
            return
        vars(old).clear()
        vars(old).update(vars(new))

    def _replace_in_tree(self, old: nn.Module, new: nn.Module) -> None:
        for module in list(self._root.modules()):
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new

    # ---- what a commit asks of an editor that does not change nodes ----

    def module_of(self, call: Call) -> nn.Module:
        """The module in whose code an operation is written."""
        assert self.tree is not None
        return self.tree.at(call)


def _in_place_of(old: nn.Module, left: list[nn.Module]) -> nn.Module:
    kept = [module for module in left if not isinstance(module, nn.Identity)]
    if len(kept) == 1:
        return kept[0]
    new = nn.Sequential(*kept) if kept else nn.Identity()
    new.training = old.training
    return new


def _of_kind(tensor: Tensor, old: Tensor) -> Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(tensor, old.requires_grad)
    return tensor


def _graph_of(
    captured: Captured,
) -> tuple[fx.GraphModule, dict[fx.Node, str], dict[str, Tensor]]:
    """The graph, its nodes that stand for tensors, and these by their names."""
    if captured.program is not None:
        program = captured.program
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
                 **signature.inputs_to_lifted_tensor_constants}  # fmt: skip
        nodes = program.graph.find_nodes(op="placeholder")
        held = {node: names[node.name] for node in nodes if node.name in names}
        tensors = {**program.state_dict, **program.constants}
        found = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
        return program.graph_module, held, found
    graph_module = captured.graph_module
    assert graph_module is not None
    held, found = {}, {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = _attribute(graph_module, str(node.target))
            if isinstance(tensor, Tensor):
                held[node], found[str(node.target)] = str(node.target), tensor
        elif node.op == "call_module":
            found |= _own(str(node.target), graph_module.get_submodule(str(node.target)))
    return graph_module, held, found


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


_READ = ("weight", "bias", "running_mean", "running_var")


def _own(path: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a leaf module, with those that are computed at every call."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    names = {*module._parameters, *module._buffers, *_READ}
    found = {name: getattr(module, name, None) for name in names}
    return {f"{path}.{name}": t for name, t in found.items() if isinstance(t, Tensor)}
