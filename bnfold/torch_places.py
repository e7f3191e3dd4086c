"""Where the operators of a merge are in a torch graph, and why one call can't take their place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from bnfold.affine import out_channels
from bnfold.channel_graph import Linear, Tie
from bnfold.folding import FoldRefusedError
from bnfold.planning import Merge, Reason
from bnfold.torch_calls import Call
from bnfold.torch_describe import Described
from bnfold.torch_facts import asks_for_rank
from bnfold.torch_inplace import Aliases, shared
from bnfold.torch_linear import LinearSite
from bnfold.torch_steps import StepSite


@dataclass(frozen=True, slots=True)
class Places:
    """The nodes of operators, and what else is done with their tensors."""

    described: Described

    # ---- nodes ----

    def outs(self, merge: Merge) -> int:
        """How many channels the one operator makes."""
        last = next(
            op for index in reversed(merge.operators)
            if isinstance(op := self.described.graph.operators[index], Linear)
        )  # fmt: skip
        return last.out_channels

    def nodes(self, index: int) -> Iterator[fx.Node]:
        """All nodes of one operator."""
        site = self.described.sites[index]
        if isinstance(site, LinearSite | StepSite):
            yield site.call.node
        if isinstance(site, LinearSite):
            yield from site.views
        yield self.made_by(index)

    def calls_of(self, merge: Merge) -> list[Call]:
        """The operations of ``merge``."""
        nodes = (node for index in self.core(merge) for node in self.nodes(index))
        found = (self.described.facts.call_of(node) for node in dict.fromkeys(nodes))
        return [call for call in found if call is not None]

    def core(self, merge: Merge) -> list[int]:
        """The operators of ``merge`` without those that it begins with and that do nothing."""
        operators = self.described.graph.operators
        left, value = list(merge.operators), merge.source
        while True:
            readers = [i for i in left if value in operators[i].inputs]
            first = operators[readers[0]]
            if len(readers) > 1 or not (isinstance(first, Tie) and first.free):
                return left
            left.remove(readers[0])
            value = first.outputs[0]

    def made_by(self, index: int) -> fx.Node:
        """What an operator makes."""
        return self.described.values[self.described.graph.operators[index].outputs[0]]

    def same(self, node: fx.Node) -> fx.Node:
        """The first of all names of a tensor."""
        facts = self.described.facts
        while True:
            node = facts.walk.resolve(node)
            call = facts.call_of(node)
            if call is None or call.op != "alias" or not isinstance(call["input"], fx.Node):
                return node
            node = call["input"]

    def local(self, merge: Merge, source: fx.Node) -> fx.Node:
        """What stands for the source in the graph of the operators."""
        read = (n for index in merge.operators for node in self.nodes(index)
                for n in node.all_input_nodes)  # fmt: skip
        return next(n for n in read if self.same(n) is self.same(source))

    def asking(self, merge: Merge) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Who asks for the sizes of a tensor that will not be there, and of which: of the source.

        Raises:
            FoldRefusedError: The source has other sizes.
        """
        facts, values = self.described.facts, self.described.values
        outputs = {
            self.described.graph.operators[index].outputs[0] for index in merge.operators
        } - {merge.target}
        inner = {self.same(values[value]) for value in outputs}
        for call in facts.walk.calls:
            for node in call.node.all_input_nodes if facts.is_aside(call) else ():
                if self.same(node) not in inner:
                    continue
                shape, source = facts.shape(node), facts.shape(values[merge.source])
                if not asks_for_rank(call) and (shape is None or shape != source or None in shape):
                    detail = f"{facts.label(call)} asks for the sizes of a tensor between them"
                    raise FoldRefusedError(merge.into, Reason.GEOMETRY, detail)
                yield call.node, node

    # ---- what can't be written ----

    def refuse_misfits(self, merge: Merge, site: LinearSite, nodes: list[fx.Node]) -> None:
        """Refuse a merge that would have to move tensors between graphs, or to change sizes.

        Raises:
            FoldRefusedError: It would.
        """
        if len({node.graph for node in nodes}) > 1:
            raise FoldRefusedError(merge.into, Reason.CAPTURED, "they are in several graphs")
        channels = out_channels(
            tuple(self.described.facts.constants.tensor(site.weight).shape), site.layout
        )
        if site.views and channels != self.outs(merge):
            detail = "its output is given another shape, with so many channels"
            raise FoldRefusedError(merge.into, Reason.GEOMETRY, detail)
        through = None if merge.through is None else self.made_by(merge.through)
        if through is not None and not can_flatten(through, self.outs(merge)):
            detail = "its output is given a shape with so many channels"
            raise FoldRefusedError(merge.into, Reason.GEOMETRY, detail)

    def changes_between(self, nodes: list[fx.Node], source: fx.Node) -> Iterator[Call]:
        """Operations, of others, that change the source in place while the operators run."""
        calls = self.described.facts.walk.calls
        inside = set(nodes)
        places = [k for k, call in enumerate(calls) if call.node in inside]
        aliases = Aliases()
        for place, call in enumerate(calls):
            for read in shared(call):
                aliases.join(call.node, read)
            target = call[call.mutates] if call.mutates else None
            if not isinstance(target, fx.Node) or call.node in inside:
                continue
            if places[0] < place < places[-1] and source in aliases.members(target):
                yield call


SHAPED = frozenset({torch.ops.aten.view.default, torch.ops.aten.reshape.default})


def can_flatten(node: fx.Node, channels: int) -> bool:
    """Whether a flattening takes so many channels, or can be made to."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and isinstance(owner.get_submodule(str(node.target)), nn.Flatten)
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    if name == "squeeze":
        return channels != 1  # it would take away that axis too
    return name == "flatten" or node.target in SHAPED
