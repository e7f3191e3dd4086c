"""Which modules of a tree can hold what was merged: the code of a forward stays as it is.

    layers one behind the other        one of them is the merged layer, the others are Identity
    a module that is a chain           modules -> the merged layer -> modules, as a Sequential

A chain is made of one tensor: its own modules, each called with what the one before it gave, and
merges. Steps of its own code have to vanish; what else is written there can't go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from bnfold.channel_graph import Affine, Tie
from bnfold.planning import Kept, Merge, Plan, Reason
from bnfold.torch_calls import Call
from bnfold.torch_describe import Described
from bnfold.torch_facts import asks_for_rank
from bnfold.torch_leaves import leaf_arguments
from bnfold.torch_linear import LinearSite
from bnfold.torch_removals import may_go
from bnfold.torch_steps import StepSite

if TYPE_CHECKING:
    from bnfold.torch_tree import ModuleTree


@dataclass(frozen=True, slots=True)
class Line:
    """Layers one behind the other: the one at ``into`` holds the merge, ``gone`` do nothing."""

    root: int
    into: str
    gone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One link of a chain: the module at ``path``, or the layer of the merge ``root``."""

    name: str
    path: str = ""
    root: int = -1


@dataclass(frozen=True, slots=True)
class Chain:
    """The module at ``path`` is its ``parts``, once the ``steps`` of its own code are gone."""

    path: str
    parts: tuple[Part, ...]
    steps: frozenset[int]


@dataclass(slots=True)
class Hosts:
    """Where the merges of a plan are held.

    Attributes:
        lines: Layers one behind the other.
        chains: Modules that become a layer or a Sequential, by path.
        refused: The last operators of merges for which there is no place.
    """

    lines: list[Line] = field(default_factory=list)
    chains: dict[str, Chain] = field(default_factory=dict)
    refused: dict[int, Kept] = field(default_factory=dict)


def hosts_of(tree: ModuleTree, described: Described, plan: Plan) -> Hosts:
    """Find a place for every merge of ``plan``."""
    finder = _Finder(tree, described, plan)
    found = Hosts()
    inside: dict[tuple[str, str], list[Merge]] = {}
    for merge in plan.merges:
        line = finder.line(merge)
        if line is not None:
            found.lines.append(line)
        else:
            inside.setdefault(finder.around(merge), []).append(merge)
    for (path, site), merges in inside.items():
        chain = finder.chain(path, site, merges)
        if chain is not None:
            found.chains[chain.path] = chain
            continue
        code = path or tree.facts.prefix or type(tree.root).__name__
        for merge in merges:
            found.refused[merge.root] = Kept(merge.root, Reason.IN_CODE, (code,))
    return found


class _Finder:
    def __init__(self, tree: ModuleTree, described: Described, plan: Plan) -> None:
        self.tree, self.described, self.plan = tree, described, plan
        self.facts = tree.facts
        self.gone = {fold.step for fold in plan.folds}
        self.calls: dict[str, list[Call]] = {}
        self.sites: dict[str, set[str]] = {}
        for call in self.facts.walk.calls:
            place = self.facts.place(call)
            for path, site in zip(place.paths, place.sites, strict=False):
                self.sites.setdefault(tree.first_path(path), set()).add(site)
                if not self._is_aside(call):
                    self.calls.setdefault(site, []).append(call)
        self.steps = {
            site.call.node: index for index, site in enumerate(described.sites)
            if isinstance(site, StepSite) and isinstance(described.graph.operators[index], Affine)
        }  # fmt: skip

    def _is_aside(self, call: Call) -> bool:
        return self.facts.constants.is_constant(call.node) or self.facts.is_aside(call)

    def _nodes(self, index: int) -> Iterator[fx.Node]:
        """The nodes of one operator."""
        site = self.described.sites[index]
        if isinstance(site, LinearSite | StepSite):
            yield site.call.node
        if isinstance(site, LinearSite):
            yield from site.views
        yield self.described.values[self.described.graph.operators[index].outputs[0]]

    def calls_of(self, merge: Merge) -> list[Call]:
        """The operations of ``merge``."""
        nodes = (node for index in self._core(merge) for node in self._nodes(index))
        found = (self.facts.call_of(node) for node in dict.fromkeys(nodes))
        return [call for call in found if call is not None]

    def _core(self, merge: Merge) -> list[int]:
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

    # ---- layers one behind the other ----

    def line(self, merge: Merge) -> Line | None:
        """The layers that do what is merged, if all of it is done by layers."""
        paths = [self._layer(i) for i in self._core(merge) if i != merge.through]
        known = [path for path in paths if path is not None]
        if len(known) < len(paths) or len(set(known)) < len(known):
            return None
        if merge.through is not None and not self._flattens(merge.through):
            return None
        if self._is_asked(merge):
            return None
        into = self._layer(merge.into)
        assert into is not None
        return Line(merge.root, into, tuple(path for path in known if path != into))

    def _is_asked(self, merge: Merge) -> bool:
        """Whether code asks for sizes of a tensor in between, which will be others."""
        values, operators = self.described.values, self.described.graph.operators
        outputs = {operators[index].outputs[0] for index in merge.operators} - {merge.target}
        inner = {values[value]: self.facts.shape(values[value]) for value in outputs}
        ends = {self.facts.shape(values[value]) for value in (merge.source, merge.target)}
        return any(
            node in inner and not asks_for_rank(call) and ends != {inner[node]}
            for call in self.facts.walk.calls if self.facts.is_aside(call) for node in call.nodes
        )  # fmt: skip

    def _layer(self, index: int) -> str | None:
        """The path of the layer that does just operator ``index``, and may be another one."""
        nodes = set(self._nodes(index))
        call = self.facts.call_of(next(iter(self._nodes(index))))
        if call is None:
            return None
        place = self.facts.place(call)
        path = self.tree.first_path(place.path)
        if not place.path or leaf_arguments(self.tree.module(path)) is None:
            return None
        alone = {c.node for c in self.calls[place.site]} <= nodes
        return path if alone and self._may_go(path) else None

    def _may_go(self, path: str) -> bool:
        once = len(self.sites.get(path, ())) == 1
        return once and self.tree.has(path) and may_go(self.tree, path)

    def _flattens(self, index: int) -> bool:
        """Whether an operator that stays takes any number of channels."""
        call = self.facts.call_of(
            self.described.values[self.described.graph.operators[index].outputs[0]]
        )
        return call is not None and call.op in ("flatten", "squeeze")

    # ---- modules that are a chain ----

    def around(self, merge: Merge) -> tuple[str, str]:
        """The innermost module around all of ``merge``, and its call."""
        places = [self.facts.place(call) for call in self.calls_of(merge)]
        path = site = ""
        for level in zip(*(zip(p.paths, p.sites, strict=False) for p in places), strict=False):
            if len(set(level)) > 1:
                break
            path, site = level[0]
        return self.tree.first_path(path), site

    def chain(self, path: str, site: str, merges: list[Merge]) -> Chain | None:
        """The module at ``path`` as a chain, with ``merges`` in it; None where it is none."""
        if not path or path in self.tree.banned or not self._may_go(path):
            return None
        inside = _Inside(self, path, site)
        if any(merge.through is not None for merge in merges) or not inside.read(merges):
            return None
        parts = inside.parts()
        if parts is None or self._is_watched(path, parts):
            return None
        return Chain(path, parts, frozenset(inside.steps))

    def _is_watched(self, path: str, parts: tuple[Part, ...]) -> bool:
        """Whether somebody watches a module that would go."""
        modules = [self.tree.module(part.path) for part in parts if part.path]
        kept = {id(m) for module in modules if not is_idle(module) for m in module.modules()}
        return any(
            id(module) not in kept and self.tree.hooked(self.tree.paths(module)[0])
            for module in self.tree.module(path).modules()
        )


@dataclass(slots=True)
class _Link:
    """A part of a chain with all that it does."""

    part: Part
    nodes: set[fx.Node] = field(default_factory=set)


class _Inside:
    """All that one call of a module does, as links of a chain."""

    def __init__(self, finder: _Finder, path: str, site: str) -> None:
        self.finder, self.path, self.site = finder, path, site
        self.facts, self.tree = finder.facts, finder.tree
        self.calls = finder.calls[site]
        self.inner = {call.node for call in self.calls}
        self.links: list[_Link] = []
        self.steps: set[int] = set()
        self.same: dict[fx.Node, fx.Node] = {}

    def read(self, merges: list[Merge]) -> bool:
        """Sort the operations into links; whether all of them are in one."""
        of_node: dict[fx.Node, _Link] = {}
        taken: set[str] = set()
        for merge in merges:
            link = _Link(Part(self._name_of(merge, taken), root=merge.root))
            self.links.append(link)
            for call in self.finder.calls_of(merge):
                link.nodes.add(call.node)
                of_node[call.node] = link
        swallowed = {self._child(call) for call in self.calls if call.node in of_node} - {("", "")}
        children: dict[str, _Link] = {}
        for call in self.calls:
            if call.node in of_node or call.op == "alias" or self._is_nothing(call):
                continue
            child, site = self._child(call)
            if not child or (child, site) in swallowed or not self.tree.is_simple(child):
                return False
            if site not in children:
                children[site] = _Link(Part(self._name(child, taken), path=child))
                self.links.append(children[site])
            children[site].nodes.add(call.node)
        paths = [link.part.path for link in children.values()]
        return len(set(paths)) == len(paths)

    def parts(self) -> tuple[Part, ...] | None:
        """The links in order; None where they are no chain from one tensor to one tensor."""
        reads = {id(link): self._reads(link) for link in self.links}
        outside = {value for found in reads.values() for value in found if value not in self.inner}
        value = next(iter(outside), None)
        ordered: list[Part] = []
        left = list(self.links)
        while left:
            after = [link for link in left if reads[id(link)] == {value}]
            if len(after) != 1 or len(outside) != 1:
                return None
            (link,) = after
            made = self._made(link)
            if made is None:
                return None
            ordered.append(link.part)
            left.remove(link)
            value = made
        return tuple(ordered) if self._given_out() <= {value} else None

    # ---- links ----

    def _is_nothing(self, call: Call) -> bool:
        """Whether code gives on what it reads: by a step that vanishes, an idle dropout."""
        if self._child(call)[0]:
            return False
        data = call["input"]
        index = self.finder.steps.get(call.node)
        if index is not None:
            site = self.finder.described.sites[index]
            assert isinstance(site, StepSite)
            data = site.data
            self.steps.add(index)
        elif call.op != "dropout" or call["train"] is not False:
            return False
        if not isinstance(data, fx.Node):
            return False
        self.same[call.node] = data
        return True

    def _reads(self, link: _Link) -> set[fx.Node]:
        """The activations that a link takes from elsewhere."""
        constants = self.facts.constants
        found = set()
        for call in self.calls:
            for node in call.nodes if call.node in link.nodes else ():
                if not constants.is_constant(node) and self._first(node) not in link.nodes:
                    found.add(self._first(node))
        return found

    def _made(self, link: _Link) -> fx.Node | None:
        """The one tensor of a link that anybody else reads."""
        made = {
            self._first(node)
            for other in self.links if other is not link for node in self._reads(other)
        } | self._given_out()  # fmt: skip
        found = made & link.nodes
        return next(iter(found)) if len(found) == 1 else None

    def _given_out(self) -> set[fx.Node]:
        """What is read outside of the module."""
        outputs = set(self.facts.walk.outputs)
        return {
            self._first(node) for node in self.inner
            if node in outputs or not self.inner.issuperset(self._readers(node))
        }  # fmt: skip

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            call = self.facts.call_of(user)
            place = None if call is None else self.facts.place(call)
            if place is None or self.site not in place.sites:
                yield user

    def _first(self, node: fx.Node) -> fx.Node:
        """The first of all names of a tensor."""
        node = self.facts.walk.resolve(node)
        while True:
            call = self.facts.call_of(node)
            aliased = call["input"] if call is not None and call.op == "alias" else None
            found = self.same.get(node, aliased)
            if not isinstance(found, fx.Node):
                return node
            node = self.facts.walk.resolve(found)

    # ---- names ----

    def _child(self, call: Call) -> tuple[str, str]:
        """The module right inside of this one that an operation is done in, and its call."""
        place = self.facts.place(call)
        at = place.sites.index(self.site) + 1
        if at >= len(place.sites):
            return "", ""
        return self.tree.first_path(place.paths[at]), place.sites[at]

    def _name_of(self, merge: Merge, taken: set[str]) -> str:
        """That of the child that the operator which stays is in."""
        site = self.finder.described.sites[merge.into]
        assert isinstance(site, LinearSite)
        child, _ = self._child(site.call)
        return self._name(child.removeprefix(f"{self.path}.").partition(".")[0] or "merged", taken)

    def _name(self, path: str, taken: set[str]) -> str:
        """The name of a child, of which no other one has it."""
        name = path.removeprefix(f"{self.path}.").replace(".", "_")
        while name in taken:
            name += "_"
        taken.add(name)
        return name


def is_idle(module: nn.Module) -> bool:
    """Whether a module gives what it is given."""
    return isinstance(module, nn.Identity) or (
        isinstance(module, _DropoutNd) and not module.training
    )


def sequential(parts: Mapping[str, nn.Module]) -> nn.Module:
    """``parts`` one behind the other; a single one by itself."""
    kept = {name: module for name, module in parts.items() if not is_idle(module)}
    if len(kept) == 1:
        return next(iter(kept.values()))
    made = nn.Sequential()
    for name, module in kept.items():
        made.add_module(name, module)
    return made.eval()
