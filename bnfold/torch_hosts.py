"""Which modules of a tree can hold what was merged: the code of a forward stays as it is.

    layers one behind the other        one of them is the merged layer, the others are Identity
    a module that is a chain           modules -> the merged layer -> modules, as a Sequential

A chain is made of one tensor: its own modules, each called with what the one before it gave, and
merges. Steps of its own code have to vanish; what else is written there can't go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from bnfold.planning import Kept, Merge, Plan, Reason
from bnfold.torch_calls import Call
from bnfold.torch_chain import Inside, Part, is_idle
from bnfold.torch_describe import Described
from bnfold.torch_leaves import leaf_arguments
from bnfold.torch_places import Places
from bnfold.torch_reach import asks_for_sizes, stores
from bnfold.torch_removals import may_go

if TYPE_CHECKING:
    from bnfold.torch_tree import ModuleTree


@dataclass(frozen=True, slots=True)
class Line:
    """Layers one behind the other: the one at ``into`` holds the merge, ``gone`` do nothing."""

    root: int
    into: str
    gone: tuple[str, ...]


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
        self.facts, self.places = tree.facts, Places(described)
        self.gone = {fold.step for fold in plan.folds}
        self.calls: dict[str, list[Call]] = {}
        self.sites: dict[str, set[str]] = {}
        for call in self.facts.walk.calls:
            place = self.facts.place(call)
            for path, site in zip(place.paths, place.sites, strict=False):
                self.sites.setdefault(tree.first_path(path), set()).add(site)
                if not self._is_aside(call):
                    self.calls.setdefault(site, []).append(call)

    def _is_aside(self, call: Call) -> bool:
        return self.facts.constants.is_constant(call.node) or self.facts.is_aside(call)

    # ---- layers one behind the other ----

    def line(self, merge: Merge) -> Line | None:
        """The layers that do what is merged, if all of it is done by layers."""
        paths = [self._layer(i) for i in self.places.core(merge) if i != merge.through]
        known = [path for path in paths if path is not None]
        if len(known) < len(paths) or len(set(known)) < len(known):
            return None
        if merge.through is not None and not self._flattens(merge.through, merge):
            return None
        if self._is_asked(merge):
            return None
        into = self._layer(merge.into)
        assert into is not None
        return Line(merge.root, into, tuple(path for path in known if path != into))

    def _is_asked(self, merge: Merge) -> bool:
        """Whether code may ask for sizes of a tensor in between, which will be others."""
        values, operators = self.described.values, self.described.graph.operators
        outputs = {operators[index].outputs[0] for index in merge.operators} - {merge.target}
        shapes = {self.facts.shape(values[v]) for v in (merge.source, merge.target, *outputs)}
        known = all(shape is not None and None not in shape for shape in shapes)
        if known and len(shapes) == 1:
            return False
        return any(asks_for_sizes(module) for module in self._between(merge))

    def _between(self, merge: Merge) -> Iterator[nn.Module]:
        """The modules whose code hands on the tensors in between."""
        places = [self.facts.place(call) for call in self.places.calls_of(merge)]
        shared = set.intersection(*(set(place.paths[:-1]) for place in places))
        path, _ = self.around(merge)
        yield self.tree.module(path or self.facts.prefix)
        for inner in {path for place in places for path in place.paths[:-1]} - shared:
            yield self.tree.module(self.tree.first_path(inner))

    def _layer(self, index: int) -> str | None:
        """The path of the layer that does just operator ``index``, and may be another one."""
        nodes = set(self.places.nodes(index))
        call = self.facts.call_of(next(iter(self.places.nodes(index))))
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

    def _flattens(self, index: int, merge: Merge) -> bool:
        """Whether an operator that stays takes as many channels as ``merge`` makes."""
        call = self.facts.call_of(self.places.made_by(index))
        if call is not None and call.op == "squeeze":
            return self.places.outs(merge) != 1
        return call is not None and call.op == "flatten"

    # ---- modules that are a chain ----

    def around(self, merge: Merge) -> tuple[str, str]:
        """The innermost module around all of ``merge``, and its call."""
        places = [self.facts.place(call) for call in self.places.calls_of(merge)]
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
        inside = Inside(self.tree, self.described, path, site, self.calls[site])
        if any(merge.through is not None for merge in merges) or not inside.read(merges):
            return None
        parts = inside.parts()
        if parts is None or not self._may_vanish(path, parts):
            return None
        return Chain(path, parts, frozenset(inside.steps))

    def _may_vanish(self, path: str, parts: tuple[Part, ...]) -> bool:
        """Whether nobody watches a module that would go, and its code does this for any sizes."""
        modules = [self.tree.module(part.path) for part in parts if part.path]
        kept = {id(m) for module in modules if not is_idle(module) for m in module.modules()}
        gone = [m for m in self.tree.module(path).modules() if id(m) not in kept]
        return not any(
            self.tree.hooked(self.tree.paths(module)[0]) or asks_for_sizes(module) or stores(module)
            for module in gone
        )
