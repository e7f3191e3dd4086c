"""An ExportedProgram that is changed: tensors written, readers moved, dead nodes swept.

A program says everything twice, in its graph and in its signature, and bodies of higher-order
operators see nothing but their operands. All of these are kept in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from bnfold.errors import UsageError
from bnfold.planning import Merge
from bnfold.torch_bodies import Nest, copied, is_pure, named_placeholder
from bnfold.torch_calls import Call
from bnfold.torch_refresh import refresh, restate_moves
from bnfold.torch_signature import (
    PREFIXES,
    Signature,
    fake,
    is_stated,
    of_kind,
    results,
    set_result,
)

STATISTICS = frozenset({"running_mean", "running_var"})
COUNTER = "num_batches_tracked"


class ProgramEditor:
    """A copy of a program, and its edits; tensors are shared with the original until written.

    Args:
        program: The program; it is not changed.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._graph_module = copied(program.graph_module)
        self._nest = Nest(self._graph_module)
        self._signature = Signature(program)
        self._state: dict[str, Any] = dict(program.state_dict)
        self._constants: dict[str, Any] = dict(program.constants)
        both = {**self._state, **self._constants}
        self._tensors = {name: value for name, value in both.items() if isinstance(value, Tensor)}
        self._held = dict(self._held_by_placeholders())
        self._unread = {node for node in self._nest.nodes() if not node.users}
        self._discarded: set[fx.Node] = set()

    def _held_by_placeholders(self) -> Iterable[tuple[fx.Node, str]]:
        nodes = self._graph_module.graph.find_nodes(op="placeholder")
        for node, spec in zip(nodes, self._signature.inputs, strict=True):
            if spec.kind in PREFIXES and spec.target in self._tensors:
                yield node, spec.target

    @property
    def edits_nodes(self) -> bool:
        """Nodes are what is edited."""
        return True

    def module_of(self, call: Call) -> nn.Module | None:
        """Nodes of a program say all that they do."""
        del call
        return None

    @property
    def graph_module(self) -> fx.GraphModule:
        """The copy that is described and then edited."""
        return self._graph_module

    @property
    def held(self) -> Mapping[fx.Node, str]:
        """The placeholders of parameters, buffers and constant tensors, with their names."""
        return MappingProxyType(self._held)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The state and the constants, with buffers that are not persistent among these."""
        return MappingProxyType(self._tensors)

    def write(self, name: str, tensor: Tensor) -> None:
        """Let the tensor ``name`` be ``tensor``; other names that are read keep what they had."""
        old = self._tensors[name]
        new = of_kind(tensor, old)
        for each in (name, *self._other_names(old)):
            for store in (self._state, self._constants, self._tensors):
                if each in store:
                    store[each] = new
        for node in self._placeholders(name):
            if not is_stated(new, node.meta["val"]):
                self._restate(node, fake(new, node.meta["val"]))

    def _other_names(self, tensor: Tensor) -> list[str]:
        """The names of a tensor that nothing reads: those of a tie that torch.export made one."""
        own = _identity(tensor)
        return [n for n in self._unread_names() if _identity(self._tensors[n]) == own]

    def _placeholders(self, name: str) -> list[fx.Node]:
        return [node for node, held in self._held.items() if held == name]

    def _restate(self, node: fx.Node, value: Tensor) -> None:
        for each in self._nest.same(node):
            each.meta["val"] = value
            each.meta.pop("tensor_meta", None)
            restate_moves(each)

    def add(self, name: str, tensor: Tensor, like: str) -> str:
        """A new tensor beside the tensor ``like``, of its kind; returns the name it got."""
        name = self._signature.free(name, self._tensors, self._graph_module)
        new = of_kind(tensor, self._tensors[like])
        self._state = _with(self._state, like, name, new)
        self._constants = _with(self._constants, like, name, new)
        self._tensors[name] = new
        beside = self._placeholders(like)[0]
        with beside.graph.inserting_after(beside):
            called = self._signature.placeholder_name(name, like)
            meta = {"val": fake(new, beside.meta["val"])}
            node = named_placeholder(beside.graph, called, meta)
        self._held[node] = name
        self._signature.insert(name, node, like)
        return name

    def set_argument(self, node: fx.Node, argument: str, name: str) -> None:
        """Let ``node``, of any of the graphs, read the tensor ``name`` as ``argument``."""
        assert isinstance(node.target, OpOverload)
        read = self._nest.deliver(self._placeholders(name)[0], node.graph)
        schema = node.target._schema.arguments
        at = next(i for i, each in enumerate(schema) if each.name == argument)
        if at < len(node.args):
            node.update_arg(at, read)
        elif at == len(node.args) and not schema[at].kwarg_only and argument not in node.kwargs:
            node.args = (*node.args, read)
        else:
            node.update_kwarg(argument, read)

    def bypass(self, value: fx.Node, data: fx.Node) -> None:
        """Whoever read ``value`` reads ``data``, of the same graph or of the outermost one."""
        data = data if data.graph is value.graph else self._nest.deliver(data, value.graph)
        output = value.graph.output_node()
        moved = [i for i, result in enumerate(results(output)) if result is value]
        value.replace_all_uses_with(data)
        for position in moved:
            if self._has_to_part(output, position):
                set_result(output, position, _clone(data, value, output))
        if output.graph is self._graph_module.graph:
            self._signature.move(value, data, output)

    def _has_to_part(self, output: fx.Node, position: int) -> bool:
        result = results(output)[position]
        assert isinstance(result, fx.Node)
        if output.graph is self._graph_module.graph:
            held = self._held.get(result, result.name)
            return self._signature.has_to_part(output, position, held)
        twice = results(output).count(result) > 1
        return (twice or result.op == "placeholder") and not self._nest.alias(output.graph)

    def discard(self, nodes: Iterable[fx.Node]) -> None:
        """Let ``nodes`` go as soon as nobody reads them, whatever they do."""
        self._discarded.update(nodes)

    def hold(self, merge: Merge, layer: nn.Module) -> None:
        """A program holds no modules."""
        raise NotImplementedError

    def sweep(self) -> None:
        """Remove what the edits left without a reader, and all of a normalisation that is gone.

        What had no reader from the start stays, unless it is another name for what is removed.
        """
        while self._sweep_nodes() or self._nest.cut(self._is_left):
            pass
        gone = {name for node, name in self._held.items() if self._is_left(node)}
        gone |= {name for name in self._unread_names() if _is_counter_of(name, gone)}
        lost = {_identity(self._tensors[name]) for name in gone}
        gone |= {name for name in self._unread_names() if _identity(self._tensors[name]) in lost}
        self._remove(gone - self._signature.mutated)
        self._signature.settle(self._graph_module.graph)

    def _is_left(self, node: fx.Node) -> bool:
        return not node.users and node not in self._unread

    def _sweep_nodes(self) -> bool:
        found = False
        for node in self._nest.nodes():
            if self._is_left(node) and (node in self._discarded or is_pure(node)):
                self._nest.erase(node)
                found = True
        return found

    def _unread_names(self) -> set[str]:
        return set(self._tensors) - {name for node, name in self._held.items() if node.users}

    def _remove(self, names: set[str]) -> None:
        for name in names:
            for node in self._placeholders(name):
                node.graph.erase_node(node)
                del self._held[node]
            self._signature.remove(name)
            for store in (self._state, self._constants, self._tensors):
                store.pop(name, None)

    def finish(self) -> ExportedProgram:
        """The edited program; the editor is done with."""
        for module in self._nest.modules:
            module.recompile()
        given = self._program
        program = ExportedProgram(
            root=self._graph_module,
            graph=self._graph_module.graph,
            graph_signature=self._signature.graph_signature,
            state_dict=self._state,
            range_constraints=dict(given.range_constraints),
            module_call_graph=self._signature.entries,
            example_inputs=given.example_inputs,
            constants=self._constants,
            verifiers=list(given.verifiers),
        )
        # They come out of the tracing; a program that was loaded from a file can't tell them again.
        program._guards_code = list(given._guards_code)
        return program


def _with(store: dict[str, Any], like: str, name: str, tensor: Tensor) -> dict[str, Any]:
    """``store`` with a new entry right behind ``like``, if that is in it."""
    if like not in store:
        return store
    at = list(store).index(like) + 1
    entries = list(store.items())
    return dict([*entries[:at], (name, tensor), *entries[at:]])


def _clone(data: fx.Node, value: fx.Node, output: fx.Node) -> fx.Node:
    with output.graph.inserting_before(output):
        clone = output.graph.call_function(torch.ops.aten.clone.default, (data,))
    clone.meta.update(value.meta)
    return clone


def _is_counter_of(name: str, gone: set[str]) -> bool:
    path, _, last = name.rpartition(".")
    beside = {f"{path}.{each}" if path else each for each in STATISTICS}
    return last == COUNTER and bool(beside & gone)


def _identity(tensor: Tensor) -> object:
    """What two names of one tensor have in common, and two tensors do not."""
    address = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    if not address:  # of a tensor without data, or without a single place for it
        return id(tensor)
    return address, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def rewrite_constants(program: ExportedProgram, values: Mapping[str, Tensor]) -> ExportedProgram:
    """A program with other numbers in its parameters, buffers and constants.

    The given program is not changed; tensors that are not named are shared with it. Parameters
    stay parameters, with their ``requires_grad``. A tensor that has several names (tied weights)
    takes the value given for any of them.

    Args:
        program: A program of torch.export, in the training dialect or decomposed.
        values: New tensors by name, as in ``state_dict`` and ``constants``. They are not copied.
            Of any shape and dtype that the operators take; where either changes, what the program
            says of the tensors inside is worked out again.

    Returns:
        A new, valid program with the same graph.

    Raises:
        UsageError: A name is unknown or not that of a tensor, a value is no tensor, tied names are
            given different values, or the shapes don't fit.
    """
    editor = ProgramEditor(program)
    names: dict[object, list[str]] = {}
    for name, tensor in editor.tensors.items():
        names.setdefault(_identity(tensor), []).append(name)
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in editor.tensors.items()}
    for name, value in values.items():
        _check(name, value, editor.tensors)
    for tied in names.values():
        _rewrite(editor, tied, [values[name] for name in tied if name in values])
    after = {name: (tensor.shape, tensor.dtype) for name, tensor in editor.tensors.items()}
    if before != after:
        refresh(editor.graph_module)
    return editor.finish()


def _check(name: str, value: object, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        near = get_close_matches(name, tensors, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see state_dict and constants"
        raise UsageError("the program has no tensor of this name", node=name, todo=hint)
    if not isinstance(value, Tensor):
        met = f"a {type(value).__name__} was given, no tensor"
        raise UsageError(met, node=name, todo="give a torch.Tensor")


def _rewrite(editor: ProgramEditor, tied: list[str], given: list[Tensor]) -> None:
    """Give all names of one tensor one new value."""
    if any(value is not given[0] and not _equal(value, given[0]) for value in given):
        met = f"{' and '.join(tied)} are one tensor, but different values were given"
        raise UsageError(met, node=tied[0], todo="give one value")
    for name in tied if given else ():
        editor.write(name, given[0] if name == tied[0] else editor.tensors[tied[0]])


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
