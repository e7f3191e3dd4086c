"""concat(W1 x + c1, W2 x + c2)  =  [W1; W2] x + [c1; c2]

Linear operators that read one tensor at the same positions, and whose outputs lie beside each other
in a Concat, are one with the rows of all of them; an affine step between goes into its rows. That
needs no copy where nobody else reads the outputs: the Concat goes, or has fewer inputs. With copies
they may have other readers too, and lie apart: then what is read elsewhere is cut from the one
tensor. What is computed is the same, position by position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from bnfold.channel_graph import (
    Affine,
    Bias,
    Linear,
    Route,
    ShiftRule,
    Sign,
    Tie,
    Value,
    ValueId,
)
from bnfold.index_maps import along
from bnfold.passes.branches import Branch, branches_of
from bnfold.passes.draft import Draft
from bnfold.passes.joining import Joined, nothing
from bnfold.planning import Cut, Fold, How, Joining, Kept, Merge, Stored


def join_beside(joined: Joined, refused: Mapping[int, Kept], *, copies: bool = False) -> Joined:
    """Join the operators whose outputs are put one after the other.

    Args:
        joined: The graph, in which operators may have been joined already.
        refused: Operators that must stay as they are.
        copies: Also where something has to be cut from what the one operator makes.
    """
    if not joined.graph.stackable:
        return joined
    concats = [k for k, op in enumerate(joined.graph.operators)
               if isinstance(op, Tie) and op.joins is not None]  # fmt: skip
    said = tuple(refused[index] for index in concats if index in refused)
    joined = replace(joined, apart=(*joined.apart, *said))
    draft = Draft(joined.graph, refused)
    for index in concats:
        while index not in refused and (group := _group(joined, draft, index, copies)):
            joined = _Stack(joined, index, group).merged()
            draft = Draft(joined.graph, refused)
    return joined


def _group(joined: Joined, draft: Draft, index: int, copies: bool) -> Sequence[Branch]:
    """Some inputs of the Concat ``index`` that one operator can make, if there are any."""
    cut = {m.into for m in joined.merges if m.cuts or m.parts or m.terms or m.through is not None}
    found = branches_of(draft, index)
    found = [b for b in found if b.linear not in cut and (copies or not b.shared)]
    for at, first in enumerate(found):
        group = [first]
        for branch in found[at + 1 :]:
            near = copies or branch.position == group[-1].position + 1
            if near and branch.is_like(first):
                group.append(branch)
        if len(group) > 1:
            return group
    return ()


class _Stack:
    """``group``, inputs of the Concat ``index``, as one operator."""

    def __init__(self, joined: Joined, index: int, group: Sequence[Branch]) -> None:
        self.joined, self.graph, self.index, self.group = joined, joined.graph, index, group
        concat = joined.graph.operators[index]
        assert isinstance(concat, Tie)
        assert concat.joins is not None
        self.concat, self.axis = concat, concat.joins
        self.values = list(joined.graph.values)
        self.linears = [self._linear(branch) for branch in group]
        ends = list(accumulate(linear.out_channels for linear in self.linears))
        self.ends, self.begins = ends, [0, *ends[:-1]]
        # Before the first one nobody reads any of them, and the source is there.
        self.into = min(branch.linear for branch in group)

    def merged(self) -> Joined:
        """The graph in which they are one, and what became of the others."""
        stretches = self._stretches()
        whole = len(self.group) == len(self.concat.inputs) and len(stretches) == 1
        target = self.concat.outputs[0] if whole else self._new(0, len(self.group))
        cuts, read = self._cuts(stretches, target)
        first = self.linears[0]
        nested = {merge.into: merge for merge in self.joined.merges}
        inside = {index for branch in self.group for index in (*branch.steps, branch.linear)}
        inside |= {i for b in self.group if b.linear in nested for i in nested[b.linear].operators}
        assert first.taps is not None
        merge = Merge(
            Joining.SIDE_BY_SIDE, tuple(sorted(inside | ({self.index} if whole else set()))),
            self.into, self.group[0].source, target, first.in_channels, 1, first.taps,
            concat=self.index, parts=() if whole else tuple(b.value for b in self.group),
            cuts=tuple(cuts),
        )  # fmt: skip
        return self._with(merge, whole, read)

    def _linear(self, branch: Branch) -> Linear:
        linear = self.graph.operators[branch.linear]
        assert isinstance(linear, Linear)
        return linear

    def _stretches(self) -> list[range]:
        """The branches, by their number in the group, whose outputs lie next to each other."""
        places = [branch.position for branch in self.group]
        starts = [k for k in range(len(places)) if k == 0 or places[k] != places[k - 1] + 1]
        return [range(*pair) for pair in zip(starts, [*starts[1:], len(places)], strict=True)]

    def _new(self, start: int, stop: int) -> ValueId:
        """A value that holds the outputs of the branches from ``start`` to ``stop``."""
        one = self.graph.values[self.group[start].value]
        shape = list(one.shape or ())
        shape[self.axis] = self.ends[stop - 1] - self.begins[start]
        self.values.append(Value(f"{one.name}_merged", tuple(shape), one.dtype))
        return len(self.values) - 1

    def _cuts(
        self, stretches: Sequence[range], target: ValueId
    ) -> tuple[list[Cut], list[tuple[range, ValueId]]]:
        """What is cut from ``target``; which value the Concat reads for each stretch."""
        cuts, read = [], []
        for stretch in stretches:
            value = target
            if len(stretches) > 1:
                alone = len(stretch) == 1
                value = (self.group[stretch[0]].value if alone
                         else self._new(stretch.start, stretch.stop))  # fmt: skip
                cuts.append(Cut(value, self.begins[stretch[0]], self.ends[stretch[-1]]))
            read.append((stretch, value))
        have = {cut.value for cut in cuts}
        for branch, begin, end in zip(self.group, self.begins, self.ends, strict=True):
            if branch.shared and branch.value not in have:
                cuts.append(Cut(branch.value, begin, end))
        return cuts, read

    # ---- the graph with it ----

    def _with(self, merge: Merge, whole: bool, read: list[tuple[range, ValueId]]) -> Joined:
        operators = list(self.graph.operators)
        concats = dict(self.joined.concats)
        for index in merge.gone:
            operators[index] = nothing(operators[index])
        operators[merge.into] = self._one(merge)
        if not whole:
            operators[self.index] = self._rejoined(read)
            concats[self.index] = operators[self.index].inputs
        if merge.cuts:
            operators[max(branch.linear for branch in self.group)] = self._cutting(merge)
        graph = replace(self.graph, values=tuple(self.values), operators=tuple(operators))
        linears = {branch.linear for branch in self.group}
        others = [m for m in self.joined.merges if m.into not in linears]
        merges = sorted([*others, merge], key=lambda m: m.root)
        return replace(self.joined, graph=graph, merges=tuple(merges), concats=concats,
                       folds=tuple(self._folds(linears)))  # fmt: skip

    def _folds(self, linears: set[int]) -> list[Fold]:
        """What went into one of these operators, earlier or now, is in the one that stays."""
        folds = [
            replace(fold, into=(self.into,)) if linears.intersection(fold.into) else fold
            for fold in self.joined.folds
        ]
        steps = (index for branch in self.group for index in branch.steps)
        gone = (index for index in steps if isinstance(self.graph.operators[index], Affine))
        return [*folds, *(Fold(k, How.JOINED, (self.into,), Stored.AFTER) for k in gone)]

    def _one(self, merge: Merge) -> Linear:
        """The operator with the rows of all of them."""
        into = self.graph.operators[merge.into]
        assert isinstance(into, Linear)
        assert into.weight is not None
        shifted = any(linear.biased for linear in self.linears) or any(
            not step.map.is_scaling
            for branch in self.group for step in map(self.graph.operators.__getitem__, branch.steps)
            if isinstance(step, Affine) and step.map is not None
        )  # fmt: skip
        bare = into.bias is Bias.OPERATOR and not shifted
        nbytes = sum(linear.weight.nbytes for linear in self.linears if linear.weight is not None)
        return replace(
            into, inputs=(merge.source,), outputs=(merge.target,), out_channels=self.ends[-1],
            weight=replace(into.weight, nbytes=nbytes), biased=shifted,
            bias=Bias.OPERATOR if bare else Bias.BUILT_IN,
        )  # fmt: skip

    def _rejoined(self, read: list[tuple[range, ValueId]]) -> Tie:
        """The Concat of what it reads from now on."""
        inputs: list[ValueId | None] = list(self.concat.inputs)
        routes: list[Route | None] = list(self.concat.routes)
        for stretch, value in read:
            places = [self.group[k].position for k in stretch]
            joined = _beside([self.concat.routes[k] for k in places], value, self.axis)
            inputs[places[0]], routes[places[0]] = value, joined
            for place in places[1:]:
                inputs[place] = routes[place] = None
        return replace(
            self.concat, inputs=tuple(v for v in inputs if v is not None),
            routes=tuple(route for route in routes if route is not None),
        )  # fmt: skip

    def _cutting(self, merge: Merge) -> Tie:
        """What cuts values from the target."""
        rank = len(self.values[merge.target].shape or self.values[merge.cuts[0].value].shape or ())
        routes = (
            Route(merge.target, cut.value, along(rank, self.axis, np.arange(cut.begin, cut.end)))
            for cut in merge.cuts
        )
        return Tie(
            name=self.graph.operators[merge.into].name, op_type="Slice", inputs=(merge.target,),
            outputs=tuple(cut.value for cut in merge.cuts), sign=Sign.ANY, shift=ShiftRule.EQUAL,
            routes=tuple(routes),
        )  # fmt: skip


def _beside(routes: Sequence[Route], value: ValueId, axis: int) -> Route:
    """One route for what ``routes`` were for, from a value that holds their sources."""
    links = []
    for link in routes[0].links or ():
        if link.target == (axis,):
            indices = [k.target_index for r in routes for k in r.links or () if k.target == (axis,)]
            assert None not in [None if index is None else 0 for index in indices]
            link = replace(link, target_index=np.concatenate([i for i in indices if i is not None]))
        links.append(link)
    return Route(value, routes[0].target, tuple(links))
