"""commit(plan): what was decided, written through an editor into a torch graph or module tree.

Everything is computed before the first edit, so that a fold that does not fit its type, or for
which there is no place, is refused while nothing has been made yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bnfold.affine import F64, AffineMap, Layout, out_channels
from bnfold.channel_graph import Affine, Norm
from bnfold.folding import (
    FoldRefusedError,
    bias_stays_away,
    checked,
    folded_bias,
    folded_weight,
    scales,
    weight_changes,
)
from bnfold.planning import Absorption, Fold, Plan, Reason
from bnfold.torch_arrays import as_array, as_tensor, numpy_type
from bnfold.torch_calls import Call
from bnfold.torch_constants import UncomputableError
from bnfold.torch_describe import Described, NormSite, PadSite
from bnfold.torch_edit import Editor
from bnfold.torch_facts import DTYPES
from bnfold.torch_inplace import Conflict, conflicts
from bnfold.torch_leftover import rewritten
from bnfold.torch_linear import LinearSite
from bnfold.torch_merge import Merging
from bnfold.torch_steps import StepSite
from bnfold.torch_weights import root_of, storage
from bnfold.torch_writes import Edit, Writer

_TORCH = {name: dtype for dtype, name in DTYPES.items()}


def commit(described: Described, plan: Plan, editor: Editor) -> None:
    """Write ``plan`` into the graph that was described, through its editor.

    Raises:
        FoldRefusedError: A folded tensor leaves the range of its type, or there is no place for
            it; nothing was edited.
    """
    work = _Commit(described, plan, Writer(described, editor))
    gone = {fold.step for fold in plan.folds} | plan.joined
    gone |= {merge.into for merge in plan.merges}
    edits = list(Merging(described, work.writer, editor, work.write_bias).edits(plan))
    edits += [
        edit
        for index, taken in sorted(plan.absorptions.items())
        if index not in gone and index not in plan.forms
        for edit in work.absorb(index, taken)
    ]  # fmt: skip
    edits += [rewritten(described, editor, work.writer, index, plan) for index in plan.forms]
    work.refuse_disagreement()
    edits += work.not_in_place()
    vanished = [_ends(described, fold.step) for fold in _vanishing(plan)]
    for edit in edits:
        edit()
    for value, node, position in vanished:
        # What the step reads by now: an Add may have been made before it.
        editor.bypass(value, node.all_input_nodes[position])
    editor.sweep()


def _vanishing(plan: Plan) -> Iterator[Fold]:
    """The folds whose steps are taken out one by one: not those that went with others."""
    return (fold for fold in plan.folds if fold.step not in plan.joined)


def _ends(described: Described, step: int) -> tuple[fx.Node, fx.Node, int]:
    """The node of a step's output, its own, and which of those that this reads is its data."""
    site = described.sites[step]
    assert isinstance(site, StepSite)
    resolve = described.facts.walk.resolve
    node = site.call.node
    position = next(k for k, n in enumerate(node.all_input_nodes) if resolve(n) is site.data)
    return described.values[described.graph.operators[step].outputs[0]], node, position


@dataclass(frozen=True, slots=True)
class _Commit:
    described: Described
    plan: Plan
    writer: Writer
    _made: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def refuse_disagreement(self) -> None:
        """Refuse where one module is called more than once, and would have to hold two things.

        Raises:
            FoldRefusedError: Not all of its calls ask for the same.
        """
        for index, label in self.writer.disagreeing():
            raise FoldRefusedError(index, Reason.SEVERAL_CALLS, label)

    def absorb(self, index: int, taken: Absorption) -> list[Edit]:
        """What operator ``index`` has to hold from now on, computed."""
        site = self.described.sites[index]
        self.writer.now = index
        try:
            if isinstance(site, LinearSite):
                return list(self._linear(index, site, taken))
            if isinstance(site, NormSite):
                return list(self._norm(index, site, taken))
            if isinstance(site, PadSite):
                return self._pad(index, site, taken)
            assert isinstance(site, StepSite)
            return list(self._step(index, site, taken))
        except UncomputableError as error:
            raise FoldRefusedError(index, Reason.WEIGHT_NOT_CONSTANT, str(error)) from error

    # ---- linear operators ----

    def _linear(self, index: int, site: LinearSite, taken: Absorption) -> Iterator[Edit]:
        weight, layout = self._stored_weight(site)
        given = site.bias
        if given is not None or not bias_stays_away(taken):
            before = self._given_bias(site, given, out_channels(tuple(weight.shape), layout))
            dtype = numpy_type(self._bias_type(site, given))
            bias = folded_bias(before, as_array(weight), layout, index, taken, dtype, site.alpha)
            yield from self.write_bias(site, given, as_tensor(bias, weight))
        if weight_changes(taken):
            yield self._write_weight(index, site, taken)

    def _write_weight(self, index: int, site: LinearSite, taken: Absorption) -> Edit:
        facts = self.described.facts
        if root_of(facts, site.weight, site.layout) is None or not self._agreed(index):
            read = self._read_weight(site)
            new = as_tensor(folded_weight(as_array(read), site.layout, index, taken), read)
            return self.writer.new(site.call, site.weight_argument, site.weight, new)
        weight, layout = self._stored_weight(site)
        key = (storage(weight), weight.shape, layout, *map(_key, scales(taken)))
        if key not in self._made:  # those who agree store one weight between them
            folded = folded_weight(as_array(weight), layout, index, taken)
            self._made[key] = as_tensor(folded, weight)
        return self.writer.over(site.weight, self._made[key])

    def _agreed(self, index: int) -> bool:
        """Whether all who read the weight of operator ``index`` scale it alike."""
        readers = self.writer.readers_of_weight(index)
        stated = {self._scaled(reader) for reader in readers}
        return len(stated) == 1

    def _scaled(self, index: int) -> tuple[object, ...]:
        taken = self.plan.absorptions.get(index, Absorption())
        return tuple(map(_key, scales(taken)))

    def _stored_weight(self, site: LinearSite) -> tuple[Tensor, Layout]:
        """The weight as the graph holds it; as it is read where it is computed."""
        root = root_of(self.described.facts, site.weight, site.layout)
        if root is None:
            return self._read_weight(site), site.layout
        return self.described.facts.constants.tensor(root.argument).detach(), root.layout

    def _read_weight(self, site: LinearSite) -> Tensor:
        facts = self.described.facts
        return facts.constants.tensor(site.weight).detach().to(_TORCH[self._type_read(site)])

    def _type_read(self, site: LinearSite) -> str:
        return self.described.facts.likely_dtype(site.weight)

    def _given_bias(self, site: LinearSite, given: Any, channels: int) -> F64:
        if given is None or site.beta == 0:
            return np.zeros(channels)
        stored = site.beta * self.described.facts.constants.float64(given)
        return np.broadcast_to(stored.ravel(), (channels,))

    def _bias_type(self, site: LinearSite, given: Any) -> torch.dtype:
        root = None if given is None else self.writer.root(given)
        if root is not None:
            return self.described.facts.constants.stored(root).dtype
        return _TORCH[self._type_read(site)]

    def write_bias(self, site: LinearSite, given: Any, bias: Tensor) -> Iterator[Edit]:
        """Give a linear operator ``bias`` in the place of the one that it was ``given``."""
        shaped = bias.reshape(-1, 1) if site.rows else bias
        if site.add is not None:
            argument = "other" if site.add["other"] is given else "input"
            yield self.writer.write(site.add, argument, given, shaped)
        elif not site.bias_argument:
            yield self.writer.add_after(site.call, site.weight, shaped)
        elif given is not None:
            yield self.writer.write(site.call, site.bias_argument, given, bias)
            if site.beta != 1:
                yield self.writer.literal(site.call, "beta", 1)
        else:
            yield self.writer.beside(site.call, "bias", site.weight, bias)

    # ---- normalisations with a scale and shift of their own, paddings ----

    def _norm(self, index: int, site: NormSite, taken: Absorption) -> Iterator[Edit]:
        call, constants = site.call, self.described.facts.constants
        assert taken.output is not None
        gamma, beta = call["weight"], call["bias"]
        own = AffineMap(np.ones(1) if gamma is None else constants.float64(gamma),
                        np.zeros(1) if beta is None else constants.float64(beta))  # fmt: skip
        norm = self.described.graph.operators[index]
        assert isinstance(norm, Norm)
        merged = taken.output.after(own).expand(norm.channels)
        assert norm.weight is not None
        dtype = numpy_type(_TORCH[norm.weight.dtype])
        like = self.writer.some_tensor(call)
        for argument, given, values in (("weight", gamma, merged.scale),
                                        ("bias", beta, merged.shift)):  # fmt: skip
            if given is None and (merged.is_scaling if argument == "bias" else merged.is_shifting):
                continue
            new = as_tensor(checked(index, values, dtype), like)
            if given is None:
                yield self.writer.beside(call, argument, gamma, new)
            else:
                yield self.writer.write(call, argument, given, new)

    def _pad(self, index: int, site: PadSite, taken: Absorption) -> list[Edit]:
        """What is padded in, in the units of the tensor that it is padded to."""
        assert taken.output is not None
        dtype = self.described.values[self.described.graph.operators[index].outputs[0]]
        stored = _TORCH.get(self.described.facts.likely_dtype(dtype), torch.float32)
        value = taken.output.scale * site.value + taken.output.shift
        number = float(checked(index, value, numpy_type(stored))[0])
        return [self.writer.literal(site.call, "value", number)]

    # ---- steps that took over others ----

    def _step(self, index: int, site: StepSite, taken: Absorption) -> Iterator[Edit]:
        step = self.described.graph.operators[index]
        assert isinstance(step, Affine)
        assert step.map is not None
        merged = taken.around(step.map)
        if site.call["running_mean"] is not None:
            yield from self._by_statistics(index, site.call, merged)
            return
        like = self.writer.some_tensor(site.call)
        dtype = numpy_type(_TORCH.get(self.described.facts.likely_dtype(site.data), like.dtype))
        shape = (-1,) + (1,) * self._trailing(site, taken) if merged.channels > 1 else ()
        scale, shift = (
            None if idle else as_tensor(checked(index, values, dtype).reshape(shape), like)
            for values, idle in (
                (merged.scale, merged.is_shifting), (merged.shift, merged.is_scaling)
            )
        )  # fmt: skip
        if scale is None and shift is None:  # a merge of what undoes each other
            scale = as_tensor(np.ones((), numpy_type(like.dtype)), like)
        yield from self.writer.instead(index, site, scale, shift)

    def _trailing(self, site: StepSite, taken: Absorption) -> int:
        """How many axes stand behind the channels of a step."""
        if taken.axis is None:
            return site.trailing
        shape = self.described.facts.shape(site.data)
        assert shape is not None
        return len(shape) - 1 - taken.axis

    def _by_statistics(self, index: int, call: Call, merged: AffineMap) -> Iterator[Edit]:
        """Scale and shift alone: mean 0, variance 1, epsilon 0."""
        constants = self.described.facts.constants
        mean = constants.tensor(call["running_mean"]).detach()
        wide = merged.expand(mean.numel())
        zero, one = np.zeros(wide.channels), np.ones(wide.channels)
        values = {"weight": wide.scale, "bias": wide.shift, "running_mean": zero,
                  "running_var": one}  # fmt: skip
        for argument, numbers in values.items():
            given = call[argument]
            like = mean if given is None else constants.tensor(given).detach()
            new = as_tensor(checked(index, numbers, numpy_type(like.dtype)), like)
            if given is None:
                yield self.writer.beside(call, argument, call["running_mean"], new)
            else:
                yield self.writer.write(call, argument, given, new)
        yield self.writer.literal(call, "eps", 0.0)

    # ---- what would be changed in place once steps are gone ----

    def not_in_place(self) -> list[Edit]:
        """Let in-place operations be functional that would change what others still read.

        Raises:
            FoldRefusedError: One of them can't be, or somebody relies on what it changes.
        """
        walk = self.described.facts.walk
        gone = dict(_outputs(self.described, self.plan))
        left = self._left(walk.calls)
        found = conflicts(left, (*walk.inputs, *walk.held), walk.outputs, gone)
        before = {conflict.call.node: set(conflict.nodes) for conflict in self.described.changed}
        calls = []
        for conflict in found:
            if before.get(conflict.call.node, set()).issuperset(conflict.late):
                continue  # so it was before: all of these names were meant to change
            fresh = conflict.call.node not in before
            if fresh and self.writer.can_be_functional(conflict.call):
                calls.append(conflict.call)
                continue
            for step in self._to_blame(conflict):
                label = self.described.facts.label(conflict.call)
                raise FoldRefusedError(step, Reason.IN_PLACE, label)
        vanished = [self._step_call(fold.step) for fold in _vanishing(self.plan)]
        calls += [call for call in vanished if call.mutates and self._edits_nodes]
        return [self.writer.functional(call) for call in calls]

    def _left(self, calls: Iterable[Call]) -> list[Call]:
        """The operations that are not gone because another one does what they did."""
        sites = [self.described.sites[index] for index in self.plan.joined]
        values = [self.described.graph.operators[index].outputs[0] for index in self.plan.joined]
        gone = {site.call.node for site in sites if site is not None}
        gone.update(self.described.values[value] for value in values)
        return [call for call in calls if call.node not in gone]

    @property
    def _edits_nodes(self) -> bool:
        return self.writer.edits_nodes

    def _step_call(self, step: int) -> Call:
        site = self.described.sites[step]
        assert isinstance(site, StepSite)
        return site.call

    def _to_blame(self, conflict: Conflict) -> Iterator[int]:
        """The steps that vanished, so that the tensor has two names."""
        names = set(conflict.nodes)
        for fold in _vanishing(self.plan):
            value, node, _ = _ends(self.described, fold.step)
            if not names.isdisjoint((value, node)):
                yield fold.step


def _key(scale: F64 | None) -> bytes:
    """What two scales have in common that do the same, whether they are given or not."""
    if scale is None or (scale == 1).all():
        return b""
    return scale[:1].tobytes() if (scale == scale[0]).all() else scale.tobytes()


def _outputs(described: Described, plan: Plan) -> Iterator[tuple[fx.Node, fx.Node]]:
    for fold in _vanishing(plan):
        site = described.sites[fold.step]
        assert isinstance(site, StepSite)
        value = described.values[described.graph.operators[fold.step].outputs[0]]
        yield site.call.node, site.data
        yield value, site.data
