"""Operators that become one, written into a torch graph, or handed to a module tree as a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from bnfold.affine import Layout
from bnfold.channel_graph import Linear
from bnfold.folding import FoldRefusedError
from bnfold.kernels import Kernel
from bnfold.merged import MergedTensors, merged_tensors
from bnfold.planning import Absorption, Merge, Plan, Reason
from bnfold.torch_arrays import as_tensor, numpy_type
from bnfold.torch_constants import UncomputableError
from bnfold.torch_describe import Described
from bnfold.torch_edit import Editor
from bnfold.torch_facts import DTYPES
from bnfold.torch_layers import layer_of, read_taps, restated
from bnfold.torch_linear import LinearSite
from bnfold.torch_places import SHAPED, Places
from bnfold.torch_weights import Root, root_of
from bnfold.torch_writes import Edit, Writer

WriteBias = Callable[[LinearSite, Any, Tensor], Iterator[Edit]]
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Merging:
    """Writes the merges of a plan.

    Args:
        described: The graph.
        writer: Makes edits of it.
        editor: Of the graph, or of the module tree that it was captured from.
        write_bias: Makes the edits that give an operator a bias.
    """

    described: Described
    writer: Writer
    editor: Editor
    write_bias: WriteBias
    _instead: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def _places(self) -> Places:
        return Places(self.described)

    def edits(self, plan: Plan) -> Iterator[Edit]:
        """What makes one operator of those in each merge: computed now, done when called.

        Raises:
            FoldRefusedError: Something does not fit its type, can't be computed, or the one
                operator can't be written in the place of the others.
        """
        for merge in plan.merges:
            taken = plan.absorptions.get(merge.into, Absorption())
            self.writer.now = merge.into
            try:
                yield self._edit(merge, taken)
            except UncomputableError as error:
                reason = Reason.WEIGHT_NOT_CONSTANT
                raise FoldRefusedError(merge.into, reason, str(error)) from error

    def _edit(self, merge: Merge, taken: Absorption) -> Edit:
        site = self.described.sites[merge.into]
        assert isinstance(site, LinearSite)
        if any(taps.begin != taps.end or taps.begin < 0 for taps in merge.taps):
            detail = "it would pad more on one side than on the other"
            raise FoldRefusedError(merge.into, Reason.GEOMETRY, detail)
        nodes = [node for index in merge.operators for node in self._places.nodes(index)]
        for call in self._places.changes_between(nodes, self.described.values[merge.source]):
            label = self.described.facts.label(call)
            raise FoldRefusedError(merge.into, Reason.IN_PLACE, label)
        if not self.editor.edits_nodes:
            return self._layer(merge, taken, site)
        self._places.refuse_misfits(merge, site, nodes)
        return self._node(merge, taken, site)

    # ---- a layer ----

    def _layer(self, merge: Merge, taken: Absorption, site: LinearSite) -> Edit:
        layout = Layout(0, 1, merge.groups)
        weight = self.described.facts.constants.tensor(site.weight).detach()
        tensors = self._computed(merge, taken, site, layout)
        bias = as_tensor(tensors.bias, weight) if self._adds(tensors, site) else None
        trained = any(self._tensors(site.weight, "requires_grad"))
        made = _formatted(as_tensor(tensors.weight, weight), weight)
        layer = layer_of(merge, made, bias, trained)
        return lambda: self.editor.hold(merge, layer)

    def _tensors(self, argument: Any, attribute: str) -> Iterator[Any]:
        constants = self.described.facts.constants
        return (getattr(constants.of_name(n), attribute) for n in constants.roots(argument))

    # ---- a node ----

    def _node(self, merge: Merge, taken: Absorption, site: LinearSite) -> Edit:
        root = self._root(site)
        layout = site.layout if root is None else root.layout
        layout = Layout(layout.out_axis, layout.in_axis, merge.groups)
        tensors = self._computed(merge, taken, site, layout)
        edits = list(self._tensor_edits(site, root, tensors))
        if site.alpha != 1:
            edits.append(self.writer.literal(site.call, "alpha", 1))
        values, node, same = self.described.values, site.call.node, self._places.same
        target = values[merge.target]
        source = self._places.local(merge, values[merge.source])
        data = next(n for n in node.all_input_nodes if same(n) is same(site.data))
        kept = {node, *site.views} | ({site.add.node} if site.add is not None else set())
        through = None if merge.through is None else self._places.made_by(merge.through)
        gone = [n for index in merge.operators for n in self._places.nodes(index) if n not in kept]
        asking = list(self._places.asking(merge))
        losing = list(self._losing(merge))

        def edit() -> None:
            made = target if through is None else self._places.made_by(merge.into)
            for question, asked in asking:
                question.replace_input_with(self._current(asked), self._current(source))
            self._read(site, merge, data, self._current(source), made)
            for each in edits:
                each()
            last = node if site.add is None else site.add.node
            if site.add is None and site.bias_argument == "" and self._adds(tensors, site):
                last = next(iter(node.users))  # the add that was made for its bias
            if through is not None:
                through.replace_input_with(through.all_input_nodes[0], last)
                _flatten(through, target, self._places.outs(merge))
                last = through
            if last is not target:
                self._instead[target] = last
                self.editor.bypass(target, last)
            for total, stays in losing:
                self._instead[total] = stays
                self.editor.bypass(total, self._current(stays))
            self.editor.discard([n for n in gone if n is not through])

        return edit

    def _losing(self, merge: Merge) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The sums that lose one of their two operands, and the one that stays.

        Raises:
            FoldRefusedError: A sum is changed in place, or changes one of the two: others may read
                what would be changed instead.
        """
        values, calls = self.described.values, self.described.facts.walk.calls
        for place in merge.left:
            total = self.described.graph.operators[place.total]
            node = values[total.outputs[0]]
            near = [call for call in calls if call.node is node or call.node in node.users]
            if len(total.inputs) != 2 or any(call.mutates for call in near):
                raise FoldRefusedError(merge.into, Reason.IN_PLACE, total.name)
            yield node, values[total.inputs[1 - place.position]]

    def _tensor_edits(
        self, site: LinearSite, root: Root | None, tensors: MergedTensors
    ) -> Iterator[Edit]:
        held = site.weight if root is None else root.argument
        like = self.described.facts.constants.tensor(held).detach()
        weight = _formatted(as_tensor(tensors.weight, like), like)
        if root is None:
            yield self.writer.new(site.call, site.weight_argument, site.weight, weight)
        else:
            yield self.writer.over(root.argument, weight)
        if self._adds(tensors, site):
            yield from self.write_bias(site, site.bias, as_tensor(tensors.bias, like))

    def _root(self, site: LinearSite) -> Root | None:
        """The held tensor that the weight is, if what is between fits any number of channels."""
        if self.writer.root(site.weight) is None:
            return None
        return root_of(self.described.facts, site.weight, site.layout)

    def _read(
        self, site: LinearSite, merge: Merge, data: fx.Node, source: fx.Node, made: fx.Node
    ) -> None:
        """Let the call of ``site`` read what all of ``merge`` read."""
        node, module = site.call.node, self.editor.module_of(site.call)
        node.replace_input_with(self._current(data), source)
        if module is not None:
            read_taps(module, merge, self._places.outs(merge))
        elif merge.taps:
            restated(node, merge)
        for each in (node, *(() if site.add is None else (site.add.node,))):
            _say_alike(each, made)
        if merge.through is not None and isinstance(node.meta.get("val"), Tensor):
            size = list(node.meta["val"].shape)
            size[1] = self._places.outs(merge)
            node.meta["val"] = node.meta["val"].new_empty(size)

    # ---- looking ----

    def _computed(
        self, merge: Merge, taken: Absorption, site: LinearSite, layout: Layout
    ) -> MergedTensors:
        facts = self.described.facts
        dtype = _TORCH[facts.likely_dtype(site.weight)]
        root = None if site.bias is None else self.writer.root(site.bias)
        bias_type = dtype if root is None else facts.constants.stored(root).dtype
        return merged_tensors(self.described.graph, merge, taken, self._kernel, layout,
                              numpy_type(dtype), numpy_type(bias_type))  # fmt: skip

    def _kernel(self, index: int) -> Kernel:
        """What a linear operator of the graph holds."""
        constants, site = self.described.facts.constants, self.described.sites[index]
        linear = self.described.graph.operators[index]
        assert isinstance(site, LinearSite)
        assert isinstance(linear, Linear)
        assert linear.taps is not None
        weight = site.alpha * constants.float64(site.weight)
        bias = None
        if site.bias is not None and site.beta != 0:
            bias = site.beta * constants.float64(site.bias).ravel()
        return Kernel.of(weight, site.layout, linear.taps, bias)

    def _adds(self, tensors: MergedTensors, site: LinearSite) -> bool:
        return bool(tensors.bias.any()) or site.bias is not None

    def _current(self, node: fx.Node) -> fx.Node:
        """What took the place of ``node``, or itself."""
        while node in self._instead:
            node = self._instead[node]
        return node


def _flatten(node: fx.Node, target: fx.Node, channels: int) -> None:
    """Let ``node`` make ``target`` of other channels than before."""
    if node.target in SHAPED:
        sizes = node.args[1]
        assert isinstance(sizes, list | tuple)
        node.update_arg(1, [sizes[0], channels])
    _say_alike(node, target)


def _say_alike(node: fx.Node, made: fx.Node) -> None:
    """Say of ``node`` what is said of the tensor ``made``, which it makes by now."""
    stated = {key: made.meta[key] for key in _STATED if key in made.meta}
    for key in _STATED:
        node.meta.pop(key, None)
    node.meta.update(stated)


_STATED = ("val", "tensor_meta", "example_value")


def _formatted(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the memory format of ``like``."""
    if like.dim() != tensor.dim() or like.dim() not in (4, 5) or like.is_contiguous():
        return tensor
    last = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
    return (
        tensor.contiguous(memory_format=last) if like.is_contiguous(memory_format=last) else tensor
    )
