"""Edits of an ONNX graph that leave nothing dangling: constants in, dead nodes out, names kept."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from bnfold.onnx_facts import Facts
from bnfold.onnx_quantised import any_dequantised

TensorLike = ir.TensorProtocol


class Editor:
    """Edits one model; `sweep` takes out what the edits left without a reader.

    ``written`` lists the initializers that were made or changed.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._model = facts.model
        self._functions = {function.graph for function in facts.model.functions.values()}
        self._names = {
            value.name for node, _ in facts.nodes() for value in (*node.inputs, *node.outputs)
            if value is not None and value.name
        }  # fmt: skip
        for graph in facts.constants.graphs:
            self._names.update(graph.initializers)
            self._names.update(v.name for v in graph.inputs if v.name)
        self._dequantised = {
            value for node, _ in facts.nodes() for value in node.outputs
            if any_dequantised(facts.constants, value) is not None
        }  # fmt: skip
        self._left: list[ir.Value] = []
        self._instead: dict[ir.Value, ir.Value] = {}
        self.written: list[ir.Value] = []

    def unique(self, name: str) -> str:
        """``name``, or ``name_1``, ``name_2`` ... whichever is not taken."""
        found, count = name, 0
        while found in self._names:
            count += 1
            found = f"{name}_{count}"
        self._names.add(found)
        return found

    # ---- constants ----

    def constant(self, graph: ir.Graph, name: str, tensor: TensorLike, at: ir.Node) -> ir.Value:
        """A new initializer of ``graph``; in a function, a Constant before ``at``."""
        tensor.name = name
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), const_value=tensor,
                         type=ir.TensorType(tensor.dtype))  # fmt: skip
        if graph in self._functions:
            node = ir.node("Constant", [], attributes={"value": tensor}, name=f"{name}_constant")
            node.outputs[0].name = name
            at.prepend(node)
            return node.outputs[0]
        self.written.append(value)
        graph.register_initializer(value)
        if self._model.ir_version < 4 and graph is self._model.graph:
            graph.inputs.append(value)  # until IR version 4 every initializer is an input too
        return value

    def set_constant(
        self, node: ir.Node, position: int, tensor: TensorLike, graph: ir.Graph, name: str
    ) -> ir.Value:
        """Make input ``position`` of ``node`` the constant ``tensor``; its name stays if free."""
        old = node.inputs[position] if position < len(node.inputs) else None
        if old is not None and self._is_own_initializer(old):
            tensor.name = old.name
            old.const_value = tensor
            old.shape = ir.Shape(tensor.shape.numpy())
            old.type = ir.TensorType(tensor.dtype)
            self.written.append(old)
            return old
        made = self.constant(graph, self.unique(name), tensor, node)
        self.set_input(node, position, made)
        return made

    def set_input(self, node: ir.Node, position: int, value: ir.Value | None) -> None:
        """Let ``node`` read ``value`` as its input ``position``."""
        if position >= len(node.inputs):
            node.resize_inputs(position + 1)
        old = node.inputs[position]
        node.replace_input_with(position, value)
        if old is not None:
            self._left.append(old)

    def keep_inputs(self, node: ir.Node, count: int) -> None:
        """Let ``node`` read its first ``count`` inputs alone."""
        self._left.extend(value for value in node.inputs[count:] if value is not None)
        node.resize_inputs(count)

    def _is_own_initializer(self, value: ir.Value) -> bool:
        """Whether ``value`` is an initializer that only one input of one node reads."""
        if not value.is_initializer() or value.is_graph_output():
            return False
        overridable = value.is_graph_input() and self._model.ir_version >= 4
        return len(value.uses()) == 1 and not overridable

    def replace_by_constant(self, value: ir.Value, tensor: TensorLike) -> None:
        """Put a constant in the place of a computed ``value``, under its name."""
        producer = value.producer()
        graph = value.graph
        if producer is None or graph is None or not (value.uses() or value.is_graph_output()):
            return
        name, value.name = value.name or self.unique("constant"), None
        new = self.constant(graph, name, tensor, producer)
        value.replace_all_uses_with(new, replace_graph_outputs=True)
        self._left.append(value)

    # ---- activations ----

    def bypass(self, node: ir.Node, position: int, *, keep_output_name: bool) -> None:
        """Take out ``node``: whoever read its output reads its input ``position``."""
        before, after = node.inputs[position], node.outputs[0]
        assert before is not None
        name = after.name
        after.replace_all_uses_with(before, replace_graph_outputs=True)
        if keep_output_name:
            after.name = None
            before.name = name
            before.shape, before.type = after.shape or before.shape, after.type or before.type
        self._remove(node)

    def add_after(self, node: ir.Node, tensor: TensorLike, graph: ir.Graph, name: str) -> None:
        """Let ``Add(output of node, tensor)`` take the place of the node's output."""
        output = node.outputs[0]
        bias = self.constant(graph, self.unique(name), tensor, node)
        add = ir.node("Add", [output, bias], name=f"{node.name}_bias" if node.name else None)
        made = add.outputs[0]
        made.shape, made.type = output.shape, output.type
        output.replace_all_uses_with(made, replace_graph_outputs=True)
        add.replace_input_with(0, output)
        made.name, output.name = output.name, self.unique(f"{output.name}_unbiased")
        node.append(add)
        self._instead[output] = made

    def take_place(self, made: ir.Value, gone: ir.Value) -> None:
        """Whoever read ``gone`` reads ``made``, which has its name from now on."""
        self._instead[gone] = made
        gone.replace_all_uses_with(made, replace_graph_outputs=True)
        name, gone.name = gone.name, None
        made.name = name
        made.shape, made.type = gone.shape, gone.type or made.type  # the channels may be others

    def current(self, value: ir.Value) -> ir.Value:
        """What took the place of ``value``, or itself."""
        while value in self._instead:
            value = self._instead[value]
        return value

    def drop(self, nodes: Iterable[ir.Node]) -> None:
        """Take out ``nodes``, of which nobody reads anything but others of them: the last first."""
        for node in nodes:
            self.sweep()  # what made a constant that is gone may have asked for their types
            self._remove(node)

    # ---- cleaning ----

    def _remove(self, node: ir.Node) -> None:
        read = [value for value in node.inputs if value is not None]
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        self._left.extend(read)

    def sweep(self) -> None:
        """Remove constants and constant nodes that lost their last reader."""
        while self._left:
            value = self._left.pop()
            if value.uses() or value.is_graph_output() or not self._is_ours(value):
                continue
            producer = value.producer()
            if producer is None:
                self._drop_initializer(value)
            elif producer.graph is not None and not any(v.uses() for v in producer.outputs):
                self._remove(producer)

    def _is_ours(self, value: ir.Value) -> bool:
        """Whether ``value`` is a constant, one of the model or one that was made here."""
        made = value.is_initializer() and not value.is_graph_input()
        known = value in self._dequantised or self._facts.constants.is_constant(value)
        return made or known

    def _drop_initializer(self, value: ir.Value) -> None:
        graph = value.graph
        if graph is None or value.name is None or value.name not in graph.initializers:
            return
        del graph.initializers[value.name]
        if value.is_graph_input() and isinstance(graph, ir.Graph):
            graph.inputs.remove(value)
