"""The signature of an ExportedProgram: copied, and kept in step with the graph.

Besides the graph's inputs and outputs it names those of the modules whose calls were to be kept
(``preserve_module_call_signature``), by the names of nodes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import (
    ArgumentSpec,
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
)

# What torch.export puts before the name of a placeholder.
PREFIXES = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_"}
MUTATIONS = frozenset(
    {OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION}
)


class Signature:
    """A copy of the signature of ``program``, and of what it says of the calls of modules."""

    def __init__(self, program: ExportedProgram) -> None:
        given = program.graph_signature
        self.inputs = [replace(spec, arg=copy(spec.arg)) for spec in given.input_specs]
        self.outputs = [replace(spec, arg=copy(spec.arg)) for spec in given.output_specs]
        self.entries = [_copied(entry) for entry in program.module_call_graph]
        self._called = _called(program.graph)

    @property
    def graph_signature(self) -> ExportGraphSignature:
        """The inputs and outputs, as torch wants them."""
        return ExportGraphSignature(self.inputs, self.outputs)

    @property
    def mutated(self) -> set[str]:
        """The tensors and inputs that are given another value by an output of the graph."""
        return {spec.target for spec in self.outputs if spec.kind in MUTATIONS and spec.target}

    def has_to_part(self, output: fx.Node, position: int, held: str) -> bool:
        """Whether an output of the graph has to become a copy of the node that it reads.

        Args:
            output: The output node of the outermost graph.
            position: Which output.
            held: The tensor or input that is read there, if it is one.
        """
        if self.outputs[position].kind not in MUTATIONS:
            return held in self.mutated
        # Specs of mutations are told apart by the nodes that they name.
        kinds = [spec.kind in MUTATIONS for spec in self.outputs]
        kept = [result for mutates, result in zip(kinds, results(output), strict=True) if mutates]
        return kept.count(results(output)[position]) > 1

    def insert(self, name: str, node: fx.Node, like: str) -> None:
        """``node`` is the placeholder of the tensor ``name``, right behind that of ``like``."""
        at = next(i for i, spec in enumerate(self.inputs) if spec.target == like)
        spec = self.inputs[at]
        new = InputSpec(spec.kind, replace(spec.arg, name=node.name), name, spec.persistent)
        self.inputs.insert(at + 1, new)

    def remove(self, name: str) -> None:
        """The tensor ``name`` has no placeholder any more."""
        self.inputs = [spec for spec in self.inputs if spec.target != name]

    def move(self, old: fx.Node, new: fx.Node, output: fx.Node) -> None:
        """What was named ``old`` is ``new`` now; the graph's results are those of ``output``."""
        for spec, result in zip(self.outputs, results(output), strict=True):
            if isinstance(result, fx.Node):
                spec.arg = replace(spec.arg, name=result.name)
        self._rename({old.name: new.name})

    def _rename(self, names: dict[str, str]) -> None:
        def renamed(arguments: list[ArgumentSpec]) -> list[ArgumentSpec]:
            return [replace(each, name=names.get(each.name, each.name)) for each in arguments]

        for signature in filter(None, (entry.signature for entry in self.entries)):
            signature.inputs = renamed(signature.inputs)
            signature.outputs = renamed(signature.outputs)

    def settle(self, graph: fx.Graph) -> None:
        """Let the calls of modules name no node that is gone.

        A module of which no operation is left has no call to keep, and as the calls of a module
        are counted through, none of its calls is.
        """
        names = {node.name for node in graph.nodes}
        gone = {_base(call) for call in self._called - _called(graph)}
        for entry in self.entries:
            if entry.signature is not None and _base(entry.fqn) in gone:
                entry.signature = None
            if entry.signature is not None:
                entry.signature.inputs = _alive(entry.signature.inputs, names)
                entry.signature.outputs = _alive(entry.signature.outputs, names)

    def free(self, name: str, tensors: Iterable[str], module: nn.Module) -> str:
        """``name``, with a number if that is the path of a tensor or module, or leads to one."""
        paths = (*tensors, *(entry.fqn for entry in self.entries))
        number, candidate = 0, name
        while hasattr(module, candidate) or any(f"{p}.".startswith(f"{candidate}.") for p in paths):
            number, candidate = number + 1, f"{name}_{number + 1}"
        return candidate

    def placeholder_name(self, name: str, like: str) -> str:
        """What torch.export would call the placeholder of ``name``, of the kind of ``like``."""
        kind = next(spec.kind for spec in self.inputs if spec.target == like)
        return PREFIXES[kind] + re.sub("[^a-zA-Z0-9]", "_", name).lower()


def _copied(entry: ModuleCallEntry) -> ModuleCallEntry:
    if entry.signature is None:
        return ModuleCallEntry(entry.fqn)
    inputs, outputs = list(entry.signature.inputs), list(entry.signature.outputs)
    return ModuleCallEntry(entry.fqn, replace(entry.signature, inputs=inputs, outputs=outputs))


def _alive(arguments: list[ArgumentSpec], names: Collection[str]) -> list[ArgumentSpec]:
    gone = ConstantArgument(name="", value=None)
    return [each if not each.name or each.name in names else gone for each in arguments]


def _called(graph: fx.Graph) -> set[str]:
    """The modules that the nodes belong to, and the number of the call where that is not 0."""
    return set(_calls(node for node in graph.nodes if node.op == "call_function"))


def _calls(nodes: Iterable[fx.Node]) -> Iterator[str]:
    for node in nodes:
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            _, mark, number = key.rpartition("@")
            yield f"{path}@{number}" if mark and number.isdigit() else path


def _base(call: str) -> str:
    return call.partition("@")[0]


def results(output: fx.Node) -> list[fx.node.Argument]:
    """What a graph gives back."""
    given = output.args[0]
    return list(given) if isinstance(given, tuple | list) else [given]


def set_result(output: fx.Node, position: int, result: fx.Node) -> None:
    """Let a graph give back ``result`` at ``position``."""
    given = output.args[0]
    if not isinstance(given, tuple | list):
        output.args = (result,)
        return
    output.args = ((*given[:position], result, *given[position + 1 :]),)


def of_kind(tensor: Tensor, old: Tensor) -> Tensor:
    """``tensor`` as what ``old`` is: a parameter or not, with its ``requires_grad``."""
    needs = old.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    parameter = isinstance(old, nn.Parameter)
    if isinstance(tensor, nn.Parameter) is parameter and tensor.requires_grad == needs:
        return tensor
    plain = tensor.detach()
    return nn.Parameter(plain, requires_grad=needs) if parameter else plain.requires_grad_(needs)


def is_stated(tensor: Tensor, value: Tensor) -> bool:
    """Whether what the graph says of a tensor, ``value``, is true of ``tensor``."""
    alike = tensor.dtype == value.dtype and tensor.requires_grad == value.requires_grad
    if tensor.shape != value.shape or tensor.device != value.device or not alike:
        return False
    return tensor.layout != torch.strided or tensor.stride() == value.stride()


def fake(tensor: Tensor, beside: Tensor) -> Tensor:
    """What a graph says of ``tensor``, in the fake mode of another value of the graph."""
    mode = getattr(beside, "fake_mode", None)
    if mode is None:
        return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
    with mode:
        shape, stride = tuple(tensor.shape), tensor.stride()
        empty = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    return empty.requires_grad_(tensor.requires_grad)
