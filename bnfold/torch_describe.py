"""describe(graph) -> channel graph: the facts of a torch graph, and where they were found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any, Protocol

from torch import fx

from bnfold.channel_graph import (
    Affine,
    Anchor,
    Bias,
    ChannelGraph,
    Leftover,
    Norm,
    Opaque,
    Operator,
    Tie,
    Value,
)
from bnfold.found import FoundLinear, FoundStep
from bnfold.torch_calls import Call
from bnfold.torch_facts import Facts
from bnfold.torch_inplace import Conflict, conflicts
from bnfold.torch_linear import LinearSite, as_operator, find_linear
from bnfold.torch_observe import is_watched_globally
from bnfold.torch_reparam import foreign_hooks
from bnfold.torch_schemas import Held
from bnfold.torch_steps import StepSite, find_step
from bnfold.torch_ties import find_tie
from bnfold.torch_walk import parts
from bnfold.torch_weights import storage


@dataclass(frozen=True, slots=True, eq=False)
class NormSite:
    """A normalisation with a scale and a shift of its own: its ``weight`` and ``bias``."""

    call: Call


@dataclass(frozen=True, slots=True, eq=False)
class PadSite:
    """A padding by a constant."""

    call: Call
    value: float


Site = LinearSite | StepSite | NormSite | PadSite | None


class Tree(Protocol):
    """What the module tree that a graph was captured from can hold; a graph alone holds all."""

    def place_of_bias(self, site: LinearSite, bias: Bias) -> Bias:
        """Where a linear operator would put a shift."""

    def weight_is_ours(self, site: LinearSite | NormSite) -> bool:
        """Whether the weight of an operator can be written."""

    def code_of(self, site: StepSite) -> str:
        """The code that a step is written in, if it can't vanish from there."""

    def is_alone(self, site: StepSite) -> bool:
        """Whether another module can stand in the place of one that does a step, and no other."""

    def hooked(self, path: str) -> bool:
        """Whether somebody sees what goes into the module at ``path`` and what comes out."""

    def other_readers(self, key: str) -> tuple[str, ...]:
        """Who else reads the storage ``key`` in code that was not captured."""


@dataclass(frozen=True, slots=True)
class Described:
    """The channel graph and where it was found: operator by operator, value by value.

    ``readers`` are the operations that read a storage and ``outside`` who else does, ``changed``
    the operations that change in place what others still read, ``watched`` those that a module
    with hooks does.
    """

    graph: ChannelGraph
    sites: tuple[Site, ...]
    values: tuple[fx.Node, ...]
    facts: Facts
    readers: Mapping[str, list[Call]]
    outside: Mapping[str, list[str]]
    changed: list[Conflict]
    watched: frozenset[fx.Node]


def describe(facts: Facts, tree: Tree | None = None) -> Described:
    """State the facts of a torch graph; nothing of it is changed.

    Args:
        facts: What is known of the graph.
        tree: The module tree that has to hold the result, if it is not the graph itself.

    Raises:
        InvalidModelError: A normalisation has parameters that mean nothing.
    """
    return _Describer(facts, tree).run()


class _Describer:
    def __init__(self, facts: Facts, tree: Tree | None) -> None:
        self.facts, self.tree = facts, tree
        self.numbers: dict[fx.Node, int] = {}
        self.nodes: list[fx.Node] = []
        self.values: list[Value] = []
        self.operators: list[Operator] = []
        self.sites: list[Site] = []
        self.absorbed: set[fx.Node] = set()
        self.taken_apart: set[fx.Node] = set()
        self.stored: dict[str, list[Call]] = {}
        self.computed: dict[fx.Node, list[Call]] = {}
        self.given_out: dict[str, list[str]] = {}
        walk = facts.walk
        self.changed = conflicts(walk.calls, (*walk.inputs, *walk.held), walk.outputs)
        self.opaque = {conflict.call.node for conflict in self.changed}

    def run(self) -> Described:
        self._who_reads()
        for call in self.facts.walk.calls:
            if call.node not in self.absorbed and not self._is_aside(call):
                self._recognise(call)
        graph = ChannelGraph(
            tuple(self.values), tuple(self.operators), dict(self._anchors()), symmetric=True,
            regroupable=self.tree is None,
        )  # fmt: skip
        return Described(
            graph, tuple(self.sites), tuple(self.nodes), self.facts, self.stored,
            self._outside(), self.changed, self._watched(),
        )  # fmt: skip

    # ---- values ----

    def _number(self, node: fx.Node) -> int:
        if node not in self.numbers:
            self.numbers[node] = len(self.values)
            self.nodes.append(node)
            dtype = self.facts.likely_dtype(node)
            self.values.append(Value(self._name(node), self.facts.shape(node), dtype))
        return self.numbers[node]

    def _name(self, node: fx.Node) -> str:
        call = self.facts.call_of(node)
        if call is None:
            # Of a part of a model nobody knows the names that its graph has for its inputs.
            return f"input of {self.facts.prefix}" if self.facts.prefix else node.name
        return self.facts.label(call)

    def _add(self, operator: Operator, site: Site) -> None:
        self.operators.append(operator)
        self.sites.append(site)

    # ---- operations ----

    def _is_aside(self, call: Call) -> bool:
        """Whether an operation makes no activation, or only takes one apart."""
        node = call.node
        if node in self.taken_apart or self.facts.constants.is_constant(node):
            return True
        return self.facts.is_aside(call)

    def _recognise(self, call: Call) -> None:
        found = parts(call)
        if found is not None:
            self.taken_apart.update(found.values())
        results = {0: call.node} if found is None else found
        if call.node in self.opaque:
            self._opaque(call, results)
        elif call.op == "alias" and isinstance(call["input"], fx.Node):
            self.numbers[call.node] = self._number(call["input"])  # one tensor under two names
        elif found is None and (linear := find_linear(self.facts, call)) is not None:
            self._linear(linear)
        elif (step := find_step(self.facts, call)) is not None and (
            set(results) <= {0} or step.training_mode
        ):
            self._step(step, results)
        else:
            self._other(call, results)

    def _linear(self, found: FoundLinear[LinearSite]) -> None:
        site = found.site
        if site.add is not None:
            self.absorbed |= {site.add.node, *site.views}
        operator = as_operator(self.facts, found, self._number, self._readers)
        if self.tree is not None:
            operator = replace(operator, bias=self.tree.place_of_bias(site, found.bias))
            if not self.tree.weight_is_ours(site):
                operator = replace(operator, weight=None)
        self._add(operator, site)

    def _step(self, found: FoundStep[StepSite], results: Mapping[int, fx.Node]) -> None:
        call, site = found.site.call, found.site
        is_constant = self.facts.constants.is_constant
        read = [n for n in call.nodes if self.facts.is_tensor(n) and not is_constant(n)]
        others = list(read)
        others.remove(site.data)
        operator = Affine(
            name=self.facts.label(call), op_type=self.facts.kind(call),
            inputs=(self._number(site.data), *(self._number(n) for n in others)),
            outputs=tuple(self._number(n) for n in results.values()),
            axis=found.axis, map=found.map, form=found.form, training_mode=found.training_mode,
            unproved=found.unproved,
            stays="" if self.tree is None else self.tree.code_of(site),
            alternatives=self._alternatives(site),
        )  # fmt: skip
        self._add(operator, site)

    def _alternatives(self, site: StepSite) -> frozenset[Leftover]:
        """As what a normalisation could be written; other steps are cheap as they are."""
        call = site.call
        if call["running_mean"] is None or self._is_hooked(self.facts.place(call).path, call):
            return frozenset()
        if self.tree is None:
            return frozenset(Leftover)
        # There is no module of torch's that multiplies and adds.
        return frozenset([Leftover.DEPTHWISE] if self.tree.is_alone(site) else [])

    def _other(self, call: Call, results: Mapping[int, fx.Node]) -> None:
        stated = find_tie(self.facts, call, self._number, self._readers, results)
        if stated is None:
            self._opaque(call, results)
            return
        site: Site = None
        if isinstance(stated, Norm):
            site = NormSite(call)
            if self.tree is not None and not self.tree.weight_is_ours(site):
                stated = replace(stated, weight=None)
        elif isinstance(stated, Tie) and stated.fill is not None:
            if self.tree is not None and stated.fill:
                self._opaque(call, results)
                return
            site = None if self.tree is not None else PadSite(call, stated.fill)
            stated = stated if self.tree is None else replace(stated, fill=None)
        self._add(stated, site)

    def _opaque(self, call: Call, results: Mapping[int, fx.Node]) -> None:
        is_constant = self.facts.constants.is_constant
        read = [n for n in call.nodes if self.facts.is_tensor(n) and not is_constant(n)]
        operator = Opaque(
            name=self.facts.label(call), op_type=self.facts.kind(call),
            inputs=tuple(self._number(n) for n in read),
            outputs=tuple(self._number(n) for n in results.values()),
        )  # fmt: skip
        self._add(operator, None)

    # ---- who reads constants ----

    def _who_reads(self) -> None:
        constants = self.facts.constants
        for call in self.facts.walk.calls:
            # A body that was gone into reads what is handed to it by itself.
            if not constants.is_constant(call.node) and call.node not in self.facts.walk.entered:
                for argument in _tensors_in(tuple(call.arguments.values())):
                    self._reads(call, argument)
        for node in self.facts.walk.outputs:
            for root in constants.roots(node) if constants.is_constant(node) else ():
                key = storage(constants.of_name(root))
                self.given_out.setdefault(key, []).append(f"output '{node.name}'")

    def _reads(self, call: Call, argument: Any) -> None:
        constants = self.facts.constants
        if isinstance(argument, fx.Node) and constants.computed(argument) is not None:
            self.computed.setdefault(argument, []).append(call)
        for root in constants.roots(argument):
            self.stored.setdefault(storage(constants.of_name(root)), []).append(call)

    def _readers(self, argument: Any) -> tuple[str, ...]:
        """The operations that read the storage of a constant, by name."""
        label = self.facts.label
        if self.facts.constants.name(argument) is None:
            return tuple(label(call) for call in self.computed.get(argument, ()))
        key = storage(self.facts.constants.stored(argument))
        return (*(label(call) for call in self.stored.get(key, ())), *self._who_else(key))

    def _who_else(self, key: str) -> tuple[str, ...]:
        others = () if self.tree is None else self.tree.other_readers(key)
        return (*self.given_out.get(key, ()), *others)

    def _outside(self) -> Mapping[str, list[str]]:
        found = {key: list(self._who_else(key)) for key in {*self.stored, *self.given_out}}
        return {key: names for key, names in found.items() if names}

    # ---- true units ----

    def _anchors(self) -> Iterable[tuple[int, Anchor]]:
        walk = self.facts.walk
        yield from self._pinned(self._seen_by_hooks(), Anchor.HOOK)
        for conflict in self.changed:
            yield from self._pinned(conflict.nodes, Anchor.CHANGED)
        yield from self._pinned(walk.inputs, Anchor.INPUT)
        yield from self._pinned(walk.captured, Anchor.CAPTURED)
        yield from self._pinned(walk.outputs, Anchor.OUTPUT)

    def _pinned(self, nodes: Iterable[fx.Node], anchor: Anchor) -> Iterable[tuple[int, Anchor]]:
        for node in nodes:
            # Where somebody takes all parts of a tuple at once, each of them is meant.
            for each in (node, *(u for u in node.users if u.target is getitem)):
                if each in self.numbers:
                    yield self.numbers[each], anchor

    def _seen_by_hooks(self) -> Collection[fx.Node]:
        """What goes into and comes out of modules with hooks."""
        inside: dict[str, set[fx.Node]] = {}
        for call in self.facts.walk.calls:
            for path in self.facts.place(call).paths:
                if self._is_hooked(path, call):
                    inside.setdefault(path, set()).add(call.node)
        seen: dict[fx.Node, None] = {}
        for nodes in inside.values():
            for call in self.facts.walk.calls:
                read = [n for n in call.nodes if (n in nodes) != (call.node in nodes)]
                seen.update(dict.fromkeys(read))
            seen.update(dict.fromkeys(n for n in self.facts.walk.outputs if n in nodes))
        return seen

    def _is_hooked(self, path: str, call: Call) -> bool:
        if self.tree is not None:
            return self.tree.hooked(path)
        leaf = path == self.facts.place(call).path
        if call.module is None or not leaf:
            return False
        return is_watched_globally() or bool(foreign_hooks(call.module))

    def _watched(self) -> frozenset[fx.Node]:
        calls = self.facts.walk.calls
        place = self.facts.place
        return frozenset(c.node for c in calls if self._is_hooked(place(c).path, c))


def _tensors_in(value: Any) -> list[Any]:
    """All tensors among arguments: nodes, and those that a leaf module holds."""
    if isinstance(value, fx.Node | Held):
        return [value]
    if isinstance(value, Mapping):
        return _tensors_in(tuple(value.values()))
    if isinstance(value, list | tuple):
        return [found for entry in value for found in _tensors_in(entry)]
    return []
