"""W2 (W1 x + c1) + c2  =  (W2 W1) x + ...      W1 x + W2 x + x  =  (W1 + W2 + 1) x

What is linear as a whole becomes one linear operator, where that has no more weights and computes
no more than what it replaces, and where it is the same at the borders too:

    what the second pads with zeros has to be what the first would give there
    branches have to read around one centre, with one stride

The graph that the other passes see has the operator that stays alone, under its own number.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

from bnfold.channel_graph import (
    Affine,
    Bias,
    ChannelGraph,
    Linear,
    Opaque,
    Operator,
    Sum,
    Tie,
    Value,
    ValueId,
)
from bnfold.passes.draft import Draft
from bnfold.passes.guards import Refusal
from bnfold.passes.joinable import Joint, joint_of, own_filter
from bnfold.passes.regions import is_linear, regions_of
from bnfold.passes.regrouping import regrouped
from bnfold.planning import Fold, How, Kept, Merge, Plan, Stored


@dataclass(frozen=True, slots=True)
class Joined:
    """A graph in which operators were joined, and what became of those of the first one."""

    graph: ChannelGraph
    merges: tuple[Merge, ...] = ()
    apart: tuple[Kept, ...] = ()
    folds: tuple[Fold, ...] = ()
    concats: Mapping[int, tuple[ValueId, ...]] = field(default_factory=dict)

    def with_merges(self, plan: Plan) -> Plan:
        """``plan`` of the joined graph as one of the graph that it was made from."""
        folds = (*plan.folds, *self.folds)
        merges, concats = self.merges, self.concats
        return replace(plan, folds=folds, merges=merges, apart=self.apart, concats=concats)


def join_linear(
    graph: ChannelGraph, draft: Draft, left_alone: Container[int] = frozenset()
) -> Joined:
    """Join what is linear as a whole, the last operators of the graph first.

    Args:
        graph: The facts.
        draft: The same graph, in which nothing is decided yet.
        left_alone: Operators that are not to end a joint.
    """
    work = _Joining(graph, draft)
    last_first = [i for i in reversed(range(len(graph.operators))) if i not in left_alone]
    for root in last_first:
        if root not in work.taken and isinstance(graph.operators[root], Linear | Sum):
            work.join(root)
    for root in last_first if graph.regroupable else ():  # what is left once sums are joined
        if root not in work.taken and isinstance(graph.operators[root], Sum):
            work.regroup(root)
    return work.joined()


def pads_before_kept(graph: ChannelGraph, plan: Plan) -> frozenset[int]:
    """The last operators of joints that are one operator and a Pad, and that keep a step.

    A Pad can hold a constant in other units, the padding of a convolution is 0: what could go
    through the Pad may not go into the joint.
    """
    witnesses = {name for kept in plan.kept for name in kept.witness}
    found = set()
    for merge in plan.merges:
        members = [graph.operators[index] for index in merge.operators]
        alone = sum(isinstance(member, Linear) for member in members) == 1
        padded = any(isinstance(m, Tie) and m.fill is not None for m in members)
        if alone and padded and graph.operators[merge.into].name in witnesses:
            found.add(merge.root)
    return frozenset(found)


@dataclass(slots=True)
class _Joining:
    graph: ChannelGraph
    draft: Draft
    taken: set[int] = field(default_factory=set)
    joints: list[Joint] = field(default_factory=list)
    apart: dict[int, Kept] = field(default_factory=dict)

    def join(self, root: int) -> None:
        """The largest region that ends in ``root`` becomes one operator, if one can."""
        if root in self.draft.refused:
            self.apart[root] = self.draft.refused[root]
        if not is_linear(self.draft, root):
            return
        why: Refusal | None = None  # of the smallest one, which is nearest to what people see
        for region in reversed(list(regions_of(self.draft, root, self.taken))):
            found = joint_of(self.draft, region, symmetric=self.graph.symmetric)
            if isinstance(found, Joint):
                self.joints.append(found)
                self.taken.update(region.operators)
                return
            why = found or why
        if why is not None:
            self.apart[root] = why.kept(root)

    def regroup(self, root: int) -> None:
        """Terms of a sum that are linear over one tensor become one term."""
        if not is_linear(self.draft, root):
            return
        for region in regrouped(self.draft, root, self.taken):
            if self.taken.intersection((*region.operators, *(p.total for p in region.left))):
                continue
            found = joint_of(self.draft, region, symmetric=self.graph.symmetric)
            if isinstance(found, Joint):
                self.joints.append(found)
                self.taken.update(region.operators, (place.total for place in region.left), (root,))
                self.apart.pop(root, None)
            elif found is not None:
                self.apart.setdefault(root, found.kept(root))

    def joined(self) -> Joined:
        """The graph with all merges made."""
        operators, values = list(self.graph.operators), list(self.graph.values)
        folds = []
        joints = sorted(self.joints, key=lambda joint: joint.merge.root)
        for joint in joints:
            merge = joint.merge
            operators[merge.into] = _one(self.graph, joint)
            if merge.through is not None:
                _pass_through(operators, values, joint)
            for index in merge.gone:
                gone = self.graph.operators[index]
                operators[index] = nothing(gone)
                if isinstance(gone, Affine):
                    folds.append(Fold(index, How.JOINED, (merge.into,), Stored.AFTER))
            for total, positions in merge.left_out.items():
                _leave_out(operators, total, positions)
        graph = replace(self.graph, operators=tuple(operators), values=tuple(values))
        merges = tuple(joint.merge for joint in joints)
        apart = tuple(kept for _, kept in sorted(self.apart.items()))
        return Joined(graph, merges, apart, tuple(folds))


def nothing(gone: Operator) -> Operator:
    """What stands in the place of an operator that is there no longer."""
    return Opaque(name=gone.name, op_type=gone.op_type, inputs=(), outputs=())


def _leave_out(operators: list[Operator], index: int, gone: set[int]) -> None:
    """Operands go from a sum; where one is left, whoever read the sum reads that."""
    total = operators[index]
    assert isinstance(total, Sum)
    stay = [k for k in range(len(total.inputs)) if k not in gone]
    inputs = tuple(total.inputs[k] for k in stay)
    if len(stay) > 1:
        signs = tuple(total.signs[k] for k in stay)
        routes = tuple(total.routes[k] for k in stay) if total.routes else ()
        operators[index] = replace(total, inputs=inputs, signs=signs, routes=routes)
        return
    operators[index] = nothing(total)
    for at, operator in enumerate(operators):
        if total.outputs[0] in operator.inputs:
            operators[at] = _reading(operator, total.outputs[0], inputs[0])


def _reading(operator: Operator, old: ValueId, new: ValueId) -> Operator:
    """``operator`` with another value in the place of one that it reads."""
    inputs = tuple(new if value == old else value for value in operator.inputs)
    if not isinstance(operator, Tie | Sum):
        return replace(operator, inputs=inputs)
    routes = tuple(
        replace(route, source=new) if route.source == old else route for route in operator.routes
    )
    return replace(operator, inputs=inputs, routes=routes)


def _pass_through(operators: list[Operator], values: list[Value], joint: Joint) -> None:
    """What the one makes goes through an operator that stays, with other channels than before."""
    merge = joint.merge
    assert merge.through is not None
    tie = operators[merge.through]
    assert isinstance(tie, Tie)
    made = tie.inputs[0]
    routes = tuple(replace(route, target=merge.target) for route in tie.routes)
    operators[merge.through] = replace(tie, outputs=(merge.target,), routes=routes)
    operators[merge.into] = replace(operators[merge.into], outputs=(made,))
    shape = values[made].shape
    assert shape is not None
    values[made] = replace(values[made], shape=(shape[0], joint.filter.outs, *shape[2:]))


def _one(graph: ChannelGraph, joint: Joint) -> Linear:
    """The operator that does what all of a region did."""
    merge, found = joint.merge, joint.filter
    linear = graph.operators[merge.into]
    assert isinstance(linear, Linear)
    assert linear.weight is not None
    padded = any(taps.begin > 0 or taps.end > 0 for taps in merge.taps)
    own = own_filter(linear, None)
    assert own is not None
    nbytes = linear.weight.nbytes * found.weights // max(1, own.weights)
    return replace(
        linear, inputs=(merge.source,), outputs=(merge.target,), in_channels=found.ins,
        out_channels=found.outs, weight=replace(linear.weight, nbytes=nbytes),
        bias=Bias.BUILT_IN if found.shifted else linear.bias, groups=merge.groups, taps=merge.taps,
        shift_barrier="it pads with zeros" if padded else "", biased=found.shifted,
    )  # fmt: skip
