"""A user's nn.Module, folded: captured, planned, and written back under the user's own names.

The graphs that were captured only prove what the module does. The result is the module itself, or
a copy of it: weights are new parameters where the old ones were, and modules that did nothing but
steps that vanished are Identity, or the activation that they ended with.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bnfold.errors import UsageError
from bnfold.folding import Options
from bnfold.planning import Kept, Reason
from bnfold.report.model import Report, Size, Step, kept_step
from bnfold.torch_calls import Call
from bnfold.torch_capture import Captured, Captures, Failure, capture
from bnfold.torch_describe import describe
from bnfold.torch_facts import Facts
from bnfold.torch_linear import storage
from bnfold.torch_model import Folded, Inputs, facts_of, fold_graph, plan_graph, refused_by_hooks
from bnfold.torch_observe import Observed, is_watched_globally, observing
from bnfold.torch_reparam import copied, materialise, owned
from bnfold.torch_steps import StepSite
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

    def sweep(self) -> None:
        """Put Identity, or what is left of them, in the place of modules that are done with."""
        assert self.tree is not None
        for path, removal in self.tree.removals.items():
            if removal.steps <= self._vanished:
                old = self.tree.module(path)
                left = [self.tree.module(inner) for inner in removal.left]
                self._replace(old, _in_place_of(old, left))

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Let ``old`` itself be ``new``: lists and whoever else holds it need not be found."""
        old.__class__ = type(new)
        vars(old).clear()
        vars(old).update(vars(new))

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


# ---- folding ----


def fold_module(
    module: nn.Module, inputs: Inputs, options: Options, *, inplace: bool
) -> tuple[nn.Module, Report]:
    """The module folded, or a folded copy of it."""
    root, lent = (module, {}) if inplace else _copy(module)
    before = size_of(root)
    captures, seen = _captured(root, inputs)
    parts = [_fold_part(root, part, seen, options) for part in captures.parts]
    owned(root, lent)
    return root, _report(root, parts, captures, options, before, size_of(root))


def _copy(module: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    try:
        return copied(module)
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        met = f"a copy of {type(module).__name__} can't be made: {reason}"
        raise UsageError(met, todo="fold it with inplace=True") from error


def explain_module(module: nn.Module, inputs: Inputs, options: Options) -> Report:
    """What `fold_module` would do; the module is left as it is."""
    captures, seen = _captured(module, inputs)
    parts = []
    for part in captures.parts:
        _, facts, tree = _described(module, part, seen)
        parts.append(_planned(facts, tree, options))
    return _report(module, parts, captures, options, size_of(module), None)


@dataclass(frozen=True, slots=True)
class _Seen:
    """How modules were called while they were captured, and whether others watch all of them."""

    observed: Observed
    watched: bool


def _captured(module: nn.Module, inputs: Inputs) -> tuple[Captures, _Seen]:
    if inputs.args is not None:
        _refuse_misfits(module, inputs)
    watched = is_watched_globally()
    with observing() as observed:
        captures = capture(module, inputs.args, inputs.kwargs, inputs.dynamic_shapes)
    return captures, _Seen(observed, watched)


def _refuse_misfits(module: nn.Module, inputs: Inputs) -> None:
    try:
        inspect.signature(module.forward).bind(*inputs.args or (), **inputs.kwargs or {})
    except TypeError as error:
        met = f"the example inputs do not fit the forward of {type(module).__name__}: {error}"
        raise UsageError(met, todo="give the arguments that the module is called with") from error
    except ValueError:
        return  # nobody knows its signature


def _described(
    root: nn.Module, part: Captured, seen: _Seen
) -> tuple[ModuleEditor, Facts, ModuleTree]:
    editor = ModuleEditor(root, part)
    changed = (
        () if part.program is None else part.program.graph_signature.buffers_to_mutate.values()
    )
    facts = facts_of(editor, changed=changed, prefix=part.path)
    outside = tuple(name for names in part.outside_readers.values() for name in names)
    tree = ModuleTree(root, facts, seen.observed, outside, seen.watched)
    editor.tree = tree
    return editor, facts, tree


def _fold_part(root: nn.Module, part: Captured, seen: _Seen, options: Options) -> Folded:
    editor, facts, tree = _described(root, part, seen)
    return fold_graph(editor, facts, options, tree, tree.partial)


def _planned(facts: Facts, tree: ModuleTree, options: Options) -> Folded:
    described = describe(facts, tree)
    refused = refused_by_hooks(described)
    while True:
        done = plan_graph(described, options, refused)
        more = tree.partial(described, done.plan)
        if not more:
            return done
        refused.update(more)


# ---- reports ----


def size_of(module: nn.Module) -> Size:
    """How large a module is: its innermost modules by class, its parameters and buffers."""
    operators: dict[str, int] = {}
    for inner in module.modules():
        if not list(inner.children()):
            operators[type(inner).__name__] = operators.get(type(inner).__name__, 0) + 1
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)]
    stored = {t.untyped_storage()._cdata: t for t in tensors}
    parameters = sum(tensor.numel() for tensor in stored.values())
    return Size(operators, parameters, sum(tensor.nbytes for tensor in stored.values()))


def _report(
    root: nn.Module,
    parts: Iterable[Folded],
    captures: Captures,
    options: Options,
    before: Size,
    after: Size | None,
) -> Report:
    done = list(parts)
    steps = [step for part in done for step in part.steps]
    steps += _not_captured(root, done, captures)
    notes = tuple(dict.fromkeys(_note(failure) for failure in captures.failures))
    return Report(type(root).__name__, options.level, tuple(steps), before, after, notes)


def _note(failure: Failure) -> str:
    what = f"'{failure.path}'" if failure.path else "the module"
    return f"{what} could not be captured as a whole: {failure.reason}"


def _not_captured(root: nn.Module, parts: list[Folded], captures: Captures) -> list[Step]:
    """The normalisations that no graph shows."""
    steps_of_parts = [
        (part.described.facts, site.call)
        for part in parts for site in part.described.sites if isinstance(site, StepSite)
    ]  # fmt: skip
    seen = {path for facts, call in steps_of_parts for path in facts.place(call).paths}
    read = {key for part in parts for key in part.described.readers}
    steps = []
    for path, module in root.named_modules():
        if isinstance(module, _NormBase) and path not in seen and not _is_read(module, read):
            if not module.track_running_stats and isinstance(module, _InstanceNorm):
                continue  # by statistics of the input: no affine step
            why = next((f.reason for f in captures.failures if _is_around(f.path, path)), "")
            name = path or type(root).__name__
            lazy = "a Lazy module has seen no input yet" if _is_lazy(module) else ""
            kept = Kept(0, Reason.NOT_CAPTURED, (name,), lazy or why or "nothing calls it")
            steps.append(kept_step(name, type(module).__name__, kept))
    return steps


def _is_lazy(module: nn.Module) -> bool:
    return any(is_lazy(t) for t in (*module.parameters(), *module.buffers()))


def _is_read(module: nn.Module, read: set[str]) -> bool:
    """Whether a graph shows what is done with the statistics of a module."""
    mean = module.running_mean
    return isinstance(mean, Tensor) and not is_lazy(mean) and storage(mean) in read


def _is_around(path: str, inner: str) -> bool:
    return not path or inner == path or inner.startswith(f"{path}.")
